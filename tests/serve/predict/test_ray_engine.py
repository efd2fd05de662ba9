"""The engine `ray`: the rows, the order and the bytes of the engine `local`, also when a worker is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import CheckError
from serve.inputs.items import failed_item, file_item
from serve.predict import ray_engine
from serve.predict.shard_maker import PlainItem, item_of, plain

Photo = Callable[..., bytes]
Predict = Callable[..., Any]
ROOT = Path(__file__).parents[3]
FLAGS = ("--batch-size", "32", "--shard-size", "50", "--threads", "1", "--quiet")


def test_items_travel_as_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    item = plain(file_item("a.jpg", "cat"))
    assert item == PlainItem("a.jpg", "cat", file=os.fsencode(folder / "a.jpg")), (
        "another process has another working folder"
    )
    assert item_of(item).read() == (folder / "a.jpg").read_bytes()
    bound = plain(file_item("a.jpg").loaded())
    assert (bound.file, bound.data) == (None, (folder / "a.jpg").read_bytes())
    assert item_of(bound).read() == bound.data
    failed = plain(failed_item("x", "encrypted", "it is"))
    assert (failed.code, failed.message) == ("encrypted", "it is")


def test_without_ray_the_engine_is_refused(
    predict: Predict, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    run = predict(folder, flags=["--engine", "ray"])
    assert run.code == 2
    assert "[ray]" in run.stderr
    assert not run.out.parent.exists() or not any(run.out.parent.iterdir())


def test_a_cluster_that_does_not_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nSee the logs.")

    fake = ModuleType("ray")
    vars(fake).update(is_initialized=lambda: False, init=init, data=None, exceptions=None)
    for name in ("ray", "ray.data", "ray.exceptions"):
        monkeypatch.setitem(sys.modules, name, fake)
    with pytest.raises(
        CheckError, match=r"^Ray did not start \(The current node timed out during startup\.\); free"
    ):
        ray_engine.start_ray()


def test_a_window_ends_by_shards_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of archives travel with their content."""
    monkeypatch.setattr(ray_engine, "WINDOW", 4)
    monkeypatch.setattr(ray_engine, "WINDOW_BYTES", 25)
    shards = iter([{"items": b"x" * size} for size in (1, 1, 1, 1, 1, 20, 5, 30, 1)])
    windows = [
        [len(shard["items"]) for shard in window]
        for window in iter(lambda: ray_engine.next_window(shards), [])
    ]
    assert windows == [[1, 1, 1, 1], [1, 20, 5], [30], [1]]


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "serve.predict", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_cluster_gives_the_bytes_of_one_machine(
    predict: Predict, tiny_bundle: Bundle, tmp_path: Path, photo: Photo
) -> None:
    pytest.importorskip("ray")
    root = tmp_path / "many"
    root.mkdir()
    for index in range(230):
        (root / f"{index:04d}.jpg").write_bytes(
            b"broken" if index % 50 == 49 else photo(index, size=(24, 20))
        )
    local = predict(root, flags=FLAGS, out="local.parquet")
    out = tmp_path / "ray.parquet"
    process = start(tiny_bundle.folder, root, "--out", out, *FLAGS, "--engine", "ray")
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 3, stderr
    assert "Traceback" not in stderr
    assert out.read_bytes() == local.out.read_bytes()
    assert not out.with_name("ray.parquet.parts").exists()


def ray_workers() -> list[int]:
    """-> process ids of the actors that make shards."""
    import psutil

    return [
        p.pid for p in psutil.process_iter(["cmdline"]) if "ShardMaker" in " ".join(p.info["cmdline"] or ())
    ]


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(400)
def test_32_a_killed_worker_costs_nothing(
    predict: Predict, tiny_bundle: Bundle, tmp_path: Path, photo: Photo
) -> None:
    pytest.importorskip("ray")
    before = set(ray_workers())
    root = tmp_path / "many"
    root.mkdir()
    (root / "0000.jpg").write_bytes(photo(1, size=(1600, 1200)))
    for index in range(1, 600):
        os.link(root / "0000.jpg", root / f"{index:04d}.jpg")
    out = tmp_path / "ray.parquet"
    process = start(tiny_bundle.folder, root, "--out", out, *FLAGS, "--engine", "ray")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("ray.parquet.parts/00000*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victims = [pid for pid in ray_workers() if pid not in before]
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=250)
    assert process.returncode == 0, stderr
    assert out.read_bytes() == predict(root, flags=FLAGS, out="local.parquet").out.read_bytes()


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(600)
def test_32_an_image_that_kills_every_worker_ends_the_job_and_one_machine_finds_it(
    tiny_bundle: Bundle, tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
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
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'patch'}:{ROOT}")
    root = tmp_path / "many"
    root.mkdir()
    for index in range(150):
        (root / f"{index:04d}.jpg").write_bytes(b"deadly" if index == 120 else photo(index, size=(24, 20)))
    arguments = [
        sys.executable,
        "-m",
        "serve.predict",
        str(tiny_bundle.folder),
        str(root),
        "--out",
        str(tmp_path / "out.jsonl"),
        *FLAGS,
    ]
    run = subprocess.run([*arguments, "--engine", "ray"], capture_output=True, text=True, timeout=400)
    assert run.returncode == 1, run.stderr
    assert "--resume" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out.jsonl").exists()
    run = subprocess.run([*arguments, "--resume"], capture_output=True, text=True, timeout=100)
    assert run.returncode == 3, run.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [index for index, row in enumerate(rows) if row["status"] != "ok"] == [120]
    assert rows[120]["status"] == "crashed"
