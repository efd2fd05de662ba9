"""`--gpu`: which one, and a process for each. Without a GPU the processes compute on the processor:
everything but the GPU itself is real."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import CheckError, DeviceLost, UsageError
from ffl_deploy.runtime import RUNTIMES, Outputs, Session
from serve.predict import gpus, tuning
from serve.predict.job import Job
from serve.predict.ray_engine import actor_count
from serve.predict.shard_maker import PlainShard
from serve.predict.supervise import WorkerDied
from tests.ffl_deploy.stub_tensorrt import Cuda, install, own_environment

Predict = Callable[..., Any]
Photo = Callable[..., bytes]
ROOT = Path(__file__).parents[3]
FLAGS = ("--batch-size", "16", "--shard-size", "32", "--threads", "1", "--quiet")
TWO_GPUS = """
import sys
import serve.predict.gpus, serve.predict.runner
serve.predict.gpus.gpu_count = lambda: 2
serve.predict.runner.require_gpu_runtime = lambda name: None
from ffl_deploy.command import run_command
from serve.predict.command import supervised_main
if __name__ == "__main__":
    sys.exit(run_command(supervised_main))
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    own_environment(monkeypatch)


@pytest.fixture
def many(tmp_path: Path, photo: Photo) -> Path:
    """150 small images, every 50th broken."""
    root = tmp_path / "many"
    root.mkdir()
    for index in range(150):
        (root / f"{index:04d}.jpg").write_bytes(
            b"broken" if index % 50 == 49 else photo(index, size=(24, 20))
        )
    return root


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """-> ffl-predict --gpu all with two GPUs that are none, as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", TWO_GPUS, *map(str, arguments), *FLAGS, "--gpu", "all"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def descendants(pid: int) -> list[int]:
    """-> the processes that `pid` started, and those that they did."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def command_line(pid: int) -> bytes:
    """-> empty where the process is gone, or waits for its parent to notice that it is."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_a_process_for_each_gpu_gives_the_bytes_of_one(
    predict: Predict, tiny_bundle: Bundle, many: Path, tmp_path: Path
) -> None:
    one = predict(many, flags=FLAGS, out="one.parquet")
    out = tmp_path / "all.parquet"
    process = start(tiny_bundle.folder, many, "--out", out)
    _, stderr = process.communicate(timeout=200)
    assert (process.returncode, stderr) == (3, "")
    assert out.read_bytes() == one.out.read_bytes()
    summary = json.loads(out.with_name("all.parquet.summary.json").read_text())
    assert summary["rows"] == 150
    assert not out.with_name("all.parquet.parts").exists()


def test_each_process_sees_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    class Maker:
        def __init__(self, *arguments: object) -> None:
            asked.append((-1, os.environ["CUDA_VISIBLE_DEVICES"]))

        def make(self, shard: PlainShard) -> bytes:
            asked.append((shard.number, os.environ["CUDA_VISIBLE_DEVICES"]))
            return b"made"

    monkeypatch.setattr(gpus, "ShardMaker", Maker)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(logging.getLogger("ffl_deploy"), "level", logging.NOTSET)  # put back at the end
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-b")
    ours, theirs = multiprocessing.Pipe()
    ours.send(PlainShard(7, b"[]", "0", ""))
    gpu = gpus.visible_gpu(1)
    # the answer, and the end of the work, once this end is closed
    monkeypatch.setattr(type(theirs), "send_bytes", lambda self, answer: ours.close())
    gpus.work(theirs, gpu, ("bundle", None, None, b""))
    assert asked == [(-1, "GPU-b"), (7, "GPU-b")]


@pytest.mark.fault
@pytest.mark.slow
def test_32_a_killed_worker_costs_nothing(
    predict: Predict, tiny_bundle: Bundle, many: Path, tmp_path: Path
) -> None:
    out = tmp_path / "all.parquet"
    process = start(tiny_bundle.folder, many, "--out", out)
    deadline = time.monotonic() + 100
    while not (workers := [pid for pid in descendants(process.pid) if b"spawn_main" in command_line(pid)]):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 3, stderr
    assert "Traceback" not in stderr
    assert out.read_bytes() == predict(many, flags=FLAGS, out="one.parquet").out.read_bytes()


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_32_an_image_that_kills_the_workers_is_one_row(
    tiny_bundle: Bundle, many: Path, tmp_path: Path
) -> None:
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from ffl_deploy import images
real = images.decode
def decode(data, *rest):
    return os.kill(os.getpid(), 9) if data.startswith(b"deadly") else real(data, *rest)
images.decode = decode
""")
    (many / "0070.jpg").write_bytes(b"deadly")
    out = tmp_path / "all.jsonl"
    process = start(tiny_bundle.folder, many, "--out", out, PYTHONPATH=f"{tmp_path / 'patch'}:{ROOT}")
    _, stderr = process.communicate(timeout=350)
    assert process.returncode == 3, stderr
    assert "Traceback" not in stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [index for index, row in enumerate(rows) if row["status"] == "crashed"] == [70]
    assert sum(row["status"] == "ok" for row in rows) == 150 - 3 - 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_28_a_signal_ends_with_130_and_leaves_no_process(
    how: int, predict: Predict, tiny_bundle: Bundle, many: Path, tmp_path: Path
) -> None:
    out = tmp_path / "all.parquet"
    process = start(tiny_bundle.folder, many, "--out", out)
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("all.parquet.parts/00000*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = descendants(process.pid)
    assert len(children) >= 3, "the supervised process and two workers"
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    if process.returncode != 3:  # it was quicker than the signal
        assert process.returncode == 130
        assert stderr.startswith("-c: error: interrupted; the finished part is in ")
        assert stderr.count("\n") == 1
    while any(command_line(child) for child in children):
        assert time.monotonic() < deadline + 100
        time.sleep(0.01)


def test_bad_input_is_one_sentence(
    predict: Predict, tiny_bundle: Bundle, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*flags: str) -> str:
        run = predict(many, flags=flags, out="rows.jsonl")
        assert (run.code, run.stderr.count("\n")) == (2, 1)
        assert not run.out.exists()
        return run.stderr

    wants = "--gpu names a GPU, and onnxruntime computes on the processor; add --runtime onnxruntime-cuda or "
    assert wants + "--runtime tensorrt." in said("--gpu", "0")
    assert wants in said("--gpu", "all")
    assert "counts GPUs from 0, so it cannot be -1" in said("--gpu", "-1")
    assert "'first' is neither the number of a GPU nor all" in said("--gpu", "first")
    install(monkeypatch, Cuda())
    assert "Ray gives each worker a GPU of its own; leave --gpu away" in said(
        "--runtime", "tensorrt", "--gpu", "all", "--engine", "ray"
    )
    install(monkeypatch, Cuda(driver=0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "there is no NVIDIA driver on this machine" in said("--runtime", "tensorrt", "--gpu", "all")
    assert "there is no GPU 1 among the 1 of CUDA_VISIBLE_DEVICES=0" in said(
        "--runtime", "tensorrt", "--gpu", "1"
    )


def test_ffl_predict_on_tensorrt_from_first_use(
    predict: Predict, tiny_bundle: Bundle, many: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cuda = Cuda()
    trt = install(monkeypatch, cuda)
    expected = predict(many, flags=FLAGS, out="cpu.jsonl").rows
    for built in (1, 1):
        run = predict(many, flags=(*FLAGS, "--runtime", "tensorrt"), out="gpu.jsonl")
        assert run.code == 3
        assert [row["label"] for row in run.rows] == [row["label"] for row in expected]
        assert len(trt.built) == built
    request = json.loads(run.out.with_name("gpu.jsonl.summary.json").read_text())["request"]
    assert request["runtime"] == "tensorrt"
    assert request["toolchain"]["gpu"] == "NVIDIA Stub (compute capability 9.0, driver for CUDA 13.0)"
    assert (
        "gpu"
        not in json.loads(run.out.with_name("cpu.jsonl.summary.json").read_text())["request"]["toolchain"]
    )
    assert cuda.held == (0, 0, 0)


@pytest.mark.parametrize("display", ["--json", "--quiet", "--top-k=5"])
def test_what_is_built_is_told_as_the_display_has_it(
    display: str, predict: Predict, many: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(monkeypatch, Cuda())
    run = predict(many, flags=("--runtime", "tensorrt", "--batch-size", "16", "--threads", "1", display))
    told = "building a TensorRT engine of model.onnx for NVIDIA Stub, which takes a minute"
    if display == "--json":
        events = [json.loads(line) for line in run.stderr.splitlines()]
        assert {"event": "remark", "message": told} in events
    elif display == "--quiet":
        assert run.stderr == ""
    else:
        assert f"ffl-predict: {told}\n" in run.stderr
    log = logging.getLogger("ffl_deploy")
    assert (log.handlers, log.propagate, log.level) == ([], True, logging.NOTSET), "as it was"


class Lost(Session):
    """A GPU that fails for good after so many runs."""

    runtime, variant, gpu = "tensorrt", "fp32", "NVIDIA Stub (9.0)"

    def __init__(self, session: Session, runs: int) -> None:
        self._session, self._runs = session, runs

    def run(self, images: np.ndarray) -> Outputs:
        self._runs -= 1
        if self._runs < 0:
            raise DeviceLost("the GPU failed: cudaErrorIllegalAddress (x); start the command again.")
        return self._session.run(images)


def test_a_gpu_that_fails_ends_the_run_and_the_finished_part_is_kept(
    predict: Predict, tiny_bundle: Bundle, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a row of its own for each of a million images."""
    real = Bundle.session
    runs = 5
    monkeypatch.setattr(
        Bundle, "session", lambda self, *args, **named: Lost(real(self, *args, **named), runs)
    )
    run = predict(many, flags=FLAGS, out="rows.jsonl")
    assert run.code == 1
    assert "the GPU failed: cudaErrorIllegalAddress (x)" in run.stderr
    assert "--resume" in run.stderr
    assert run.stderr.count("\n") == 1
    parts = run.out.with_name("rows.jsonl.parts")
    assert sorted(path.name for path in parts.glob("0*.json")) == ["000000.json", "000001.json"]
    monkeypatch.setattr(Bundle, "session", real)
    again = predict(many, flags=(*FLAGS, "--resume"), out="rows.jsonl")
    assert (again.code, len(again.rows)) == (3, 150)


class Gpu(Session):
    """Takes up to `room` images at once; the more, the faster for each."""

    runtime, variant, gpu = "tensorrt", "fp32", "NVIDIA Stub (9.0)"

    def __init__(self, room: int) -> None:
        self.room, self.closed = room, 0

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(("room", "expected"), [(4096, 1024), (300, 256), (16, 16)])
def test_tuning_on_a_gpu_tries_large_batches_and_two_streams(
    room: int, expected: int, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = type("_", (Gpu,), {"run": lambda self, images: None})(room)
    monkeypatch.setattr(Bundle, "session", lambda *_, **__: session)
    tried = []

    def rate(session: Gpu, bundle: Bundle, batch: int, streams: int) -> float:
        tried.append((batch, streams))
        if batch > session.room:
            raise CheckError("out of memory")
        return 1e6 * batch * (1.3 if streams == 2 else 1.0)

    monkeypatch.setattr(tuning, "measured_rate", rate)
    job = Job(str(tiny_bundle.folder), ["in"], Path("out"), runtime="tensorrt")
    assert tuning.fastest(tiny_bundle, job, cores=8) == (expected, 2)
    assert {streams for _, streams in tried} == {1, 2}
    assert session.closed == 2
    session.room = 8
    with pytest.raises(CheckError, match="out of memory"):
        tuning.fastest(tiny_bundle, job, cores=8)
    tried.clear()
    session.room = 4096
    tuning.fastest(tiny_bundle, replace(job, runtime="onnxruntime"), cores=8)
    assert set(tried) == {(16, 1), (64, 1), (16, 8), (64, 8)}


def test_a_share_of_the_cores_is_each_process_own(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle
) -> None:
    monkeypatch.setattr(tuning, "gpu_count", lambda: 4)
    monkeypatch.setattr(tuning, "available_cores", lambda: 16)
    job = Job(str(tiny_bundle.folder), ["in"], Path("out"), gpu="all", runtime="tensorrt")
    settings = tuning.choose_settings(tiny_bundle, job, small=True)
    assert (settings.threads, settings.decoders) == (4, 4)
    assert tuning.choose_settings(tiny_bundle, replace(job, gpu=0), small=True).decoders == 16


def test_ray_starts_an_actor_for_each_gpu() -> None:
    cpu, gpu = {"num_cpus": 2}, {"num_cpus": 2, "num_gpus": 1}
    node = {"CPU": 64.0, "GPU": 4.0}
    assert actor_count(cpu, node, shards=100) == 32
    assert actor_count(gpu, node, shards=100) == 4, "not one for each core, all on the first GPU"
    assert actor_count(gpu, node, shards=3) == 3
    assert actor_count({"num_cpus": 32, "num_gpus": 1}, node, shards=100) == 2
    with pytest.raises(UsageError, match="no node of the Ray cluster has a GPU"):
        actor_count(gpu, {"CPU": 64.0}, shards=100)


def test_without_supervision_a_killed_worker_is_one_sentence(
    predict: Predict, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise WorkerDied("SIGKILL")

    monkeypatch.setattr("serve.predict.local.predict_shards", die)
    run = predict(many, flags=FLAGS, out="rows.jsonl")
    assert run.code == 1
    assert "a worker died (SIGKILL); the finished part is kept" in run.stderr


def test_the_runtimes_that_compute_on_a_gpu_say_so() -> None:
    assert [name for name, runtime in RUNTIMES.items() if runtime.gpu] == ["onnxruntime-cuda", "tensorrt"]
