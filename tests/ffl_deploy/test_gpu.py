"""What only a GPU can show of deployment: `pytest -m gpu tests/ffl_deploy/test_gpu.py`. Each runtime that is
installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import CheckError, FflError
from ffl_deploy.runtime import RUNTIMES, gpu

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
RUNTIMES_THERE = [name for name, runtime in RUNTIMES.items() if runtime.gpu]


@pytest.fixture(params=RUNTIMES_THERE)
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """-> a runtime that starts here, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        RUNTIMES[request.param].require()
    except FflError as error:
        pytest.skip(f"{request.param} does not start here: {error}")
    return str(request.param)


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundles" / "tiny", size=64, golden_count=40)


def test_the_golden_logits_at_any_batch_and_from_several_threads(bundle: Bundle, runtime: str) -> None:
    session, golden = bundle.session(runtime=runtime), bundle.golden()
    assert session.gpu
    limit = 1e-4 * float(golden.logits.std())
    for count in (1, 3, 8, 40, 300, 1100):
        logits = session.run(np.resize(golden.images, (count, *golden.images.shape[1:]))).logits
        assert logits == pytest.approx(np.resize(golden.logits, logits.shape), abs=limit)
    with ThreadPoolExecutor(8) as pool:
        for logits in pool.map(lambda start: session.run(golden.images[start:]).logits, range(30)):
            assert logits == pytest.approx(golden.logits[-len(logits) :], abs=limit)
    with pytest.raises(CheckError):
        session.run(np.zeros((2, 5, 32, 3), np.uint8))
    session.close()


def test_opening_and_closing_gives_the_memory_back(bundle: Bundle, runtime: str) -> None:
    images = bundle.golden().images
    used = []
    for _ in range(8):
        session = bundle.open(runtime=runtime)
        session.run(images)
        session.close()
        del session
        found = gpu.memory()
        assert found is not None
        used.append(found.used)
    assert used[-1] - used[2] < 64 << 20, "what stays is CUDA's own, and does not grow"


def test_the_commands_on_a_gpu(bundle: Bundle, runtime: str, tmp_path: Path) -> None:
    def run(*command: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    if runtime == "tensorrt":
        said = run("ffl_deploy.engine", bundle.folder)
        assert "fp32 gate passed" in said
        assert "images/s: " in said
    assert "fp32 gate passed" in run("ffl_deploy.verify", bundle.folder, "--runtime", runtime)
    images = ROOT / "examples" / "cifar100" / "images"
    for flags in (("--gpu", "0"), ("--gpu", "all")):
        out = tmp_path / f"{flags[1]}.jsonl"
        run("serve.predict", bundle.folder, images, "--runtime", runtime, "--out", out, *flags)
        assert '"status":"ok"' in out.read_text().replace(" ", "")
