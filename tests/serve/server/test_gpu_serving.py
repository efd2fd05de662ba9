"""Serving on a GPU, without one: on a stand-in for TensorRT that computes what the file says."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import UsageError
from serve.command import parse_arguments
from serve.server.models import check_specs, open_model, workers_and_threads
from serve.server.settings import ModelSpec, Settings
from tests.ffl_deploy.stub_tensorrt import Cuda, install, own_environment

Start = Callable[[Settings], contextlib.AbstractContextManager[Any]]
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    own_environment(monkeypatch)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cuda:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Cuda()


def settings_of(bundle: Bundle, **changes: Any) -> Settings:
    return Settings((ModelSpec("tiny", bundle.folder),), demo=False, **changes)


def infer(url: str, count: int = 3) -> httpx.Response:
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "UINT8", "data": images.tolist()}
    return httpx.post(f"{url}/v2/models/tiny/infer", json={"inputs": [tensor]})


def test_an_engine_is_built_before_the_server_is_ready_and_answers(
    cuda: Cuda, tiny_bundle: Bundle, start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = install(monkeypatch, cuda)
    with start_server(settings_of(tiny_bundle)) as running:
        expected = infer(running.url).json()["outputs"]
        assert "ffl_gpu_memory_bytes" not in httpx.get(f"{running.url}/metrics").text
    with start_server(settings_of(tiny_bundle, runtime="tensorrt")) as running:
        assert len(trt.built) == 1
        warm = list(trt.runs)
        found = infer(running.url).json()["outputs"]
        metrics = httpx.get(f"{running.url}/metrics").text
        model = httpx.get(f"{running.url}/v2/models/tiny").json()
    for before, after in zip(expected, found, strict=True):
        assert before["name"] == after["name"]
        np.testing.assert_allclose(before["data"], after["data"], atol=1e-5)
    assert {(0, 1), (1, 8), (2, 32)} <= set(warm), "each profile has run before the first request"
    assert trt.runs[len(warm) :] == [(1, 3)]
    assert model["platform"] == "tensorrt_fp32"
    lines = [line for line in metrics.splitlines() if line.startswith("ffl_gpu_memory_bytes{")]
    values = {line.partition("kind=")[2].split('"')[1]: float(line.split()[-1]) for line in lines}
    assert all('gpu="NVIDIA Stub (9.0)"' in line for line in lines)
    assert values["total"] == 80 << 30
    assert 0 < values["used"] < 1 << 30


def test_a_gpu_has_one_worker_and_a_processor_two(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle
) -> None:
    monkeypatch.setattr("serve.server.models.available_cores", lambda: 8)
    settings = settings_of(tiny_bundle)
    assert workers_and_threads(settings, "onnxruntime") == (2, 4)
    assert workers_and_threads(settings, "tensorrt") == (1, 8)
    assert workers_and_threads(settings_of(tiny_bundle, workers=3), "tensorrt") == (3, 2)
    assert parse_arguments([str(tiny_bundle.folder)]).workers is None


def test_the_flag_makes_its_gpu_the_only_one(
    cuda: Cuda, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ffl_deploy.runtime import gpu
    from serve.command import run

    settings = parse_arguments([str(tiny_bundle.folder), "--gpu", "2", "--runtime", "tensorrt"])
    monkeypatch.setattr("serve.lifecycle.serve", lambda *_: None)
    run(settings)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("2", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert [gpu.visible_gpu(number) for number in (0, 1)] == ["GPU-a", "GPU-b"]
    install(monkeypatch, cuda)
    with pytest.raises(UsageError, match="--gpu names a GPU, and onnxruntime computes on the processor"):
        open_model(settings_of(tiny_bundle).models[0], settings_of(tiny_bundle, gpu=0), lambda *_: None)
    check_specs(settings.models)


LOSING = """
import os, sys
from ffl_deploy.command import run_command
from ffl_deploy.errors import DeviceLost
from ffl_deploy.runtime.onnx_runtime import OnnxRuntimeSession
from serve.command import main
real = OnnxRuntimeSession.run
def run(self, images):
    if os.path.exists(os.environ["LOST"]):
        raise DeviceLost("the GPU failed: cudaErrorIllegalAddress (x); start the command again.")
    return real(self, images)
OnnxRuntimeSession.run = run
sys.exit(run_command(main))
"""


def test_a_gpu_that_fails_for_good_ends_readiness_and_the_process(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """It would answer 500 for ever, and balancers would go on sending."""
    lost, log = tmp_path / "lost", tmp_path / "log"
    flags = [f"tiny={tiny_bundle.folder}", "--port", "0", "--no-demo", "--log-format", "json"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", LOSING, *flags],
            stderr=errors,
            cwd=ROOT,
            env=os.environ | {"LOST": str(lost)},
        )
    try:
        deadline = time.monotonic() + 100
        while '"message": "ready"' not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ready = next(line for line in log.read_text().splitlines() if '"message": "ready"' in line)
        url = json.loads(ready)["url"]
        assert infer(url).status_code == 200
        assert httpx.get(f"{url}/v2/health/ready").status_code == 200
        lost.touch()
        assert infer(url).status_code == 500
        with contextlib.suppress(httpx.TransportError):  # the port may be closed already
            assert httpx.get(f"{url}/v2/health/ready").status_code == 503
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.wait()
    said = log.read_text().splitlines()
    assert said[-1] == ("-c: error: the GPU failed: cudaErrorIllegalAddress (x); start the command again.")
    assert not [line for line in said if line.startswith("Traceback")]
    assert sum('"message": "the GPU failed"' in line for line in said) == 1
