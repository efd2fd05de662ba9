"""No door answers with a variant whose golden answers are not PyTorch's; `auto` goes through every door."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from ffl_deploy import fastest
from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import CheckError
from ffl_deploy.fastest import Timings
from ffl_deploy.runtime import OnnxRuntimeSession, Outputs, Session
from serve.pipeline import WorkSettings
from serve.predict.ray_engine import RayShardMaker
from serve.predict.shard_maker import MadeShard, Refused
from serve.predict.shards import ShardsManifest, shards_folder
from serve.server.settings import ModelSpec, Settings

Predict = Callable[..., Any]
ROOT = Path(__file__).parents[2]
SENTENCE = "does not give PyTorch's logits on this processor with onnxruntime ("
ADVICE = "; use --variant fp32, which holds here."


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def half_wrong(make_bundle: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    """fp32 and `small` hold; `int8` has other weights."""
    return make_bundle(tmp_path / "fused", variants=("fp32", "int8", "small"), wrong=("int8",))


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What `auto` takes a run of each variant for, in seconds; ONNX Runtime alone is tried."""
    seconds = {"fp32": 0.4, "int8": 0.1, "small": 0.2}

    def timed(sessions: Sequence[Session], images: np.ndarray) -> Timings:
        return Timings(32, [[seconds[session.variant]] * 3 for session in sessions])

    monkeypatch.setattr(fastest, "timed", timed)
    monkeypatch.setattr(fastest, "EVERYWHERE", ("onnxruntime",))
    return seconds


def test_ffl_predict_writes_no_row(predict: Predict, half_wrong: Bundle, folder: Path) -> None:
    run = predict(folder, flags=["--variant", "int8"], bundle=half_wrong)
    assert run.code == 1
    assert "variant int8 of " in run.stderr
    assert SENTENCE in run.stderr
    assert run.stderr.endswith(ADVICE + "\n")
    assert run.stdout == ""
    assert not run.out.exists()
    assert not shards_folder(run.out).exists()
    assert predict(folder, bundle=half_wrong).code == 0


def test_the_command_prints_no_row(half_wrong: Bundle, folder: Path) -> None:
    """As it is typed: a child process under supervision, rows on the screen."""
    command = [
        sys.executable,
        "-m",
        "serve.predict",
        str(half_wrong.folder),
        str(folder / "a.jpg"),
        "--variant",
        "int8",
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.endswith(ADVICE + "\n")
    assert "Traceback" not in run.stderr


def test_a_verdict_is_kept_between_commands(
    predict: Predict, half_wrong: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of the network for the folder's three images,
    and for the golden samples only the first time."""
    runs: list[int] = []
    real = OnnxRuntimeSession.run

    def run(self: OnnxRuntimeSession, images: np.ndarray) -> Outputs:
        runs.append(len(images))
        return real(self, images)

    monkeypatch.setattr(OnnxRuntimeSession, "run", run)
    for expected in ([*[1] * 8, 7, 1, 8, 3], [3]):
        runs.clear()
        assert predict(folder, bundle=half_wrong).code == 0
        assert runs == expected


@pytest.mark.parametrize("module", ["serve.command", "serve.demo"])
def test_a_server_is_never_ready(half_wrong: Bundle, module: str) -> None:
    flags = ["--variant", "int8", "--port", "0", "--log-format", "json"]
    command = [sys.executable, "-m", module, str(half_wrong.folder), *flags]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.returncode == 1
    assert SENTENCE in run.stderr
    assert ADVICE in run.stderr
    assert '"ready"' not in run.stderr
    assert "Traceback" not in run.stderr


def test_readiness_answers_no_and_nothing_is_inferred(half_wrong: Bundle) -> None:
    """Loading has failed, and the port is still open."""
    from serve.app import create_app

    failed = threading.Event()
    app = create_app(Settings((ModelSpec("fused", half_wrong.folder, "int8"),), demo=False), stop=failed.set)

    async def ask() -> tuple[list[int], BaseException | None]:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            deadline = time.monotonic() + 60
            while not failed.is_set():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            request = {
                "inputs": [
                    {"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [0] * 3072}
                ]
            }
            answers = [
                await client.get("/v2/health/live"),
                await client.get("/v2/health/ready"),
                await client.get("/v2/models/fused/ready"),
                await client.post("/v2/models/fused/infer", json=request),
            ]
            return [answer.status_code for answer in answers], app.state.service.failure

    (live, ready, model, answer), failure = asyncio.run(ask())
    assert (live, ready) == (200, 503)
    assert model >= 400
    assert answer >= 400
    assert isinstance(failure, CheckError)
    assert ADVICE in str(failure)


def shard_manifest(bundle: Bundle, variant: str, out: Path) -> bytes:
    """-> what a Ray worker is told of a run."""
    from serve.predict.job import Job
    from serve.predict.runner import make_request

    request = make_request(Job(str(bundle.folder), ["in"], out, variant=variant), bundle)
    return msgspec.json.encode(
        ShardsManifest(request, WorkSettings(32, 50, streams=1, threads=1, decoders=1))
    )


def test_a_ray_worker_sends_back_why_it_does_not_answer(half_wrong: Bundle, tmp_path: Path) -> None:
    """What Ray calls in each of its workers, called here: another node may be another processor."""
    answers = []
    for variant in ("int8", "fp32"):
        manifest = shard_manifest(half_wrong, variant, tmp_path / "rows.jsonl")
        maker = RayShardMaker(str(half_wrong.folder), variant, None, manifest)
        (made,) = maker({"number": np.array([7]), "items": [b"[]"], "sha256": ["0"], "each": [""]})["made"]
        answers.append(msgspec.msgpack.decode(made, type=MadeShard | Refused))
    refused, made = answers
    assert isinstance(refused, Refused)
    assert refused.exit_code == 1
    assert refused.message.startswith("worker on ")
    assert refused.message.endswith(ADVICE)
    assert isinstance(made, MadeShard)
    assert (made.index, made.record.rows) == (7, 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_ray_job_ends_with_the_workers_sentence(predict: Predict, half_wrong: Bundle, folder: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    out = folder.parent / "ray.jsonl"
    flags = ["--variant", "int8", "--engine", "ray", "--out", str(out), "--quiet"]
    command = [sys.executable, "-m", "serve.predict", str(half_wrong.folder), str(folder), *flags]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=500,
    )
    assert run.returncode == 1, run.stderr
    assert SENTENCE in run.stderr
    assert ADVICE in run.stderr
    assert "Traceback" not in run.stderr
    assert not out.exists()
    assert not shards_folder(out).exists()


def test_predict_auto_says_which_and_why(
    predict: Predict, half_wrong: Bundle, folder: Path, stopwatch: dict[str, float]
) -> None:
    run = predict(folder, flags=["--variant", "auto"], bundle=half_wrong)
    why = (
        "small on onnxruntime is the fastest that holds its gate here: 160 images/s at batch 32, fp32 on "
        "onnxruntime 80; "
    )
    assert run.code == 0
    assert run.stderr.startswith(f"ffl-predict: {why}")
    assert (
        run.rows == predict(folder, flags=["--variant", "small"], bundle=half_wrong, out="named.jsonl").rows
    )
    summary = json.loads(run.out.with_name("predictions.jsonl.summary.json").read_text())
    assert (summary["request"]["variant"], summary["request"]["runtime"]) == ("small", "onnxruntime")
    assert summary["auto"]["why"].startswith(why)
    assert list(summary["auto"]["refused"]) == ["int8 on onnxruntime"]
    assert "auto" not in json.loads(run.out.with_name("named.jsonl.summary.json").read_text())
    quiet = predict(folder, flags=["--variant", "auto", "--quiet"], bundle=half_wrong)
    assert (quiet.code, quiet.stderr) == (0, "")
    lines = predict(folder, flags=["--variant", "auto", "--json"], bundle=half_wrong).stderr.splitlines()
    assert json.loads(lines[0])["event"] == "variant"
    assert json.loads(lines[0])["variant"] == "small"


def test_inputs_are_looked_at_before_anything_is_measured(
    predict: Predict, half_wrong: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastest, "fastest", lambda *_: pytest.fail("measured"))
    assert predict(tmp_path / "*.jpg", flags=["--variant", "auto"], bundle=half_wrong).code == 2
    run = predict(tmp_path, flags=["--variant", "auot"], bundle=half_wrong)
    assert (run.code, "Did you mean 'auto'?" in run.stderr) == (2, True)


def test_a_resume_keeps_the_variant_of_its_run(
    predict: Predict,
    half_wrong: Bundle,
    folder: Path,
    stopwatch: dict[str, float],
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where nothing is remembered and another variant would win by now."""
    from serve.predict import runner

    flags = ["--variant", "auto", "--shard-size", "2", "--batch-size", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(runner, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        stopped = predict(folder, flags=flags, bundle=half_wrong)
    assert stopped.code == 130
    for path in empty_cache.rglob("*.json"):
        path.unlink()
    stopwatch["fp32"] = 0.01
    done = predict(folder, flags=[*flags, "--resume"], bundle=half_wrong)
    assert (done.code, done.stderr) == (0, "")
    summary = json.loads(done.out.with_name("predictions.jsonl.summary.json").read_text())
    assert (summary["request"]["variant"], summary["resumed_rows"]) == ("small", 3)
    again = predict(folder, flags=[*flags, "--resume"], bundle=half_wrong)
    assert (again.code, "is already complete" in again.stdout) == (0, True)


def test_a_server_takes_the_fastest_of_each_bundle(
    half_wrong: Bundle,
    two_bundles: tuple[Bundle, Bundle],
    stopwatch: dict[str, float],
    start_server: Callable[[Settings], AbstractContextManager[Any]],
) -> None:
    models = (ModelSpec("a", half_wrong.folder, "auto"), ModelSpec("b", two_bundles[1].folder, "auto"))
    with start_server(Settings(models, demo=False)) as running:
        served = running.service.models
        assert [(model.variant.name, model.session.variant) for model in served.values()] == [
            ("small",) * 2,
            ("fp32",) * 2,
        ]
        assert served["a"].why.startswith(
            "small on onnxruntime is the fastest that holds its gate here: 160 images/s"
        )
        metadata = httpx.get(f"{running.url}/v2/models/a").json()
        assert metadata["platform"] == "onnxruntime_fp32"
