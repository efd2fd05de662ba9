"""Kills, full disks, second processes, dying workers:
a resume gives the bytes of a run that was never stopped."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ffl_deploy.bundle import Bundle
from serve.predict import shards

Predict = Callable[..., Any]
Photo = Callable[..., bytes]
ROOT = Path(__file__).parents[3]
PREDICT = (sys.executable, "-m", "serve.predict")


def start(*arguments: object, script: str | None = None) -> subprocess.Popen[str]:
    """-> ffl-predict (or a script that patches it first) as a process of its own."""
    command = PREDICT if script is None else (sys.executable, "-c", script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """-> (exit code, standard error)."""
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


@pytest.fixture
def many(tmp_path: Path, photo: Photo) -> Path:
    """300 small images, every 50th broken."""
    root = tmp_path / "many"
    root.mkdir()
    for index in range(300):
        (root / f"{index:04d}.jpg").write_bytes(
            b"broken" if index % 50 == 49 else photo(index, size=(24, 20))
        )
    return root


FLAGS = ("--batch-size", "16", "--shard-size", "32", "--threads", "2", "--quiet")


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
def test_28_a_resume_repeats_the_bytes(
    predict: Predict, many: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predict(many, flags=FLAGS, out=f"whole.{format}")
    assert whole.code == 3
    real, calls = shards.ShardsFolder.commit, []

    def failing(self: Any, *arguments: Any) -> None:
        calls.append(arguments[0])
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, *arguments)

    monkeypatch.setattr(shards.ShardsFolder, "commit", failing)
    run = predict(many, flags=FLAGS, out=f"cut.{format}")
    assert run.code == 130
    assert not run.out.exists(), "the output appears only when it is complete"
    assert len(list((run.out.parent / f"cut.{format}.parts").glob("[0-9]*.json"))) == 3
    monkeypatch.undo()
    assert predict(many, flags=FLAGS, out=f"cut.{format}").code == 2, (
        "an unfinished run is not thrown away without being asked"
    )
    resumed = predict(many, flags=(*FLAGS, "--resume"), out=f"cut.{format}")
    assert resumed.code == 3
    assert resumed.out.read_bytes() == whole.out.read_bytes()
    assert not (run.out.parent / f"cut.{format}.parts").exists()
    summary = json.loads(resumed.out.with_name(f"cut.{format}.summary.json").read_text())
    assert (summary["rows"], summary["resumed_rows"], summary["statuses"]) == (
        300,
        96,
        {"not_an_image": 6, "ok": 294},
    )
    assert predict(many, flags=(*FLAGS, "--resume"), out=f"cut.{format}").code == 3, (
        "a finished run is finished, and ends as it did"
    )


def test_28_a_damaged_shard_is_made_again(
    predict: Predict, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predict(many, flags=FLAGS, out="whole.jsonl")
    interrupted(predict, many, monkeypatch, after=5)
    parts = whole.out.with_name("cut.jsonl.parts")
    (parts / "000001.jsonl").write_text("half a row")
    (parts / "000002.json").write_text("{")
    (parts / "000003.jsonl").unlink()
    resumed = predict(many, flags=(*FLAGS, "--resume"), out="cut.jsonl")
    assert resumed.out.read_bytes() == whole.out.read_bytes()


def interrupted(predict: Predict, source: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Leave cut.jsonl.parts with `after` finished shards."""
    real = shards.ShardsFolder.commit

    def commit(self: Any, index: int, *rest: Any) -> None:
        if index == after:
            raise KeyboardInterrupt
        real(self, index, *rest)

    monkeypatch.setattr(shards.ShardsFolder, "commit", commit)
    assert predict(source, flags=FLAGS, out="cut.jsonl").code == 130
    monkeypatch.undo()


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "shortened"])
def test_28_a_resume_over_changed_inputs_is_refused(
    predict: Predict, many: Path, photo: Photo, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(predict, many, monkeypatch, after=3)
    if change == "added":
        (many / "0000b.jpg").write_bytes(photo(0))
    elif change == "removed":
        (many / "0005.jpg").unlink()
    elif change == "shortened":
        # shards 0 and 1 are what they were, shard 2 has no inputs left
        for path in sorted(many.iterdir())[64:]:
            path.unlink()
    else:
        (many / "0007.jpg").rename(many / "0007x.jpg")
    run = predict(many, flags=(*FLAGS, "--resume"), out="cut.jsonl")
    assert run.code == 2
    assert "inputs changed" in run.stderr
    assert not run.out.exists()


@pytest.mark.parametrize(
    "flags", [("--top-k", "2"), ("--logits",), ("--batch-size", "8"), ("--shard-size", "64")]
)
def test_28_a_resume_with_other_settings_is_refused(
    predict: Predict, many: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(predict, many, monkeypatch, after=3)
    run = predict(many, flags=(*FLAGS, *flags, "--resume"), out="cut.jsonl")
    assert run.code == 2
    assert "cut.jsonl.parts" in run.stderr


def test_28_a_resume_with_another_bundle_is_refused(
    predict: Predict,
    many: Path,
    tmp_path: Path,
    make_bundle: Callable[..., Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted(predict, many, monkeypatch, after=3)
    other = make_bundle(tmp_path / "other", seed=1)
    run = predict(many, flags=(*FLAGS, "--resume"), out="cut.jsonl", bundle=other)
    assert (run.code, "bundle_sha256" in run.stderr) == (2, True)


def test_28_a_resume_takes_batch_and_shard_size_from_the_manifest(
    predict: Predict, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predict(many, flags=FLAGS, out="whole.jsonl")
    interrupted(predict, many, monkeypatch, after=3)
    resumed = predict(many, flags=("--resume",), out="cut.jsonl")
    assert resumed.out.read_bytes() == whole.out.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.fault
def test_28_a_signal_ends_with_130_and_a_resume_goes_on(
    predict: Predict, tiny_bundle: Bundle, many: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole = predict(many, flags=FLAGS, out="whole.jsonl")
    out = tmp_path / "out" / "cut.jsonl"
    process = start(tiny_bundle.folder, many, "--out", out, *FLAGS, script=SLOW)
    wait_for(lambda: (tmp_path / "out" / "cut.jsonl.parts" / "000001.json").exists())
    process.send_signal(number)
    code, stderr = finish(process)
    assert code == 130
    assert "--resume" in stderr
    assert stderr.count("\n") == 1
    assert finish(start(tiny_bundle.folder, many, "--out", out, *FLAGS, "--resume"))[0] == 3
    assert out.read_bytes() == whole.out.read_bytes()


# ffl-predict with 3 ms more for each image, so that there is something to interrupt.
SLOW = """
import sys, time
from serve.inputs import items
real = items.read_file
def read_file(path):
    time.sleep(.003)
    return real(path)
items.read_file = read_file
from serve.predict.command import entry
sys.argv[0] = "ffl-predict"
entry()
"""


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.fault
@pytest.mark.timeout(1800)
def test_28_fifty_sigkills_at_random_moments(tiny_bundle: Bundle, many: Path, tmp_path: Path) -> None:
    """Each round: start, kill -9 at a random moment, resume to the end. Every file is the same, bit for bit.

    A moment is some milliseconds after a random shard (of ten) is finished, or after the start: by wall time
    alone, a busy machine would have all of them fall into the imports.
    """
    rng = random.Random(20261123)
    flags = ("--batch-size", "16", "--shard-size", "32", "--threads", "1", "--quiet")
    whole = tmp_path / "whole.parquet"
    assert finish(start(tiny_bundle.folder, many, "--out", whole, *flags))[0] == 3
    wanted, interrupted_mid_run = whole.read_bytes(), 0
    for number in range(50):
        out, parts = tmp_path / f"{number}.parquet", tmp_path / f"{number}.parquet.parts"
        process = start(tiny_bundle.folder, many, "--out", out, *flags, script=SLOW)
        shard = rng.randint(-1, 9)
        while shard >= 0 and process.poll() is None and not (parts / f"{shard:06d}.json").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05 if shard >= 0 else 0.5))
        process.kill()
        finish(process)
        interrupted_mid_run += any(parts.glob("[0-9]*.json"))
        code, stderr = finish(start(tiny_bundle.folder, many, "--out", out, *flags, "--resume"))
        assert code in (0, 3), stderr
        assert out.read_bytes() == wanted
        assert not parts.exists()
    print(f"{interrupted_mid_run} of 50 kills left finished shards")
    assert interrupted_mid_run >= 25, "the kills missed the run; the test says nothing"


def test_27_a_full_disk_keeps_the_finished_shards(
    predict: Predict, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predict(many, flags=FLAGS, out="whole.jsonl")
    real, writes = shards.write_atomically, []

    def write(path: Path, content: bytes | str, tidy: bool) -> None:
        writes.append(path)
        if len(writes) > 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content, tidy)

    monkeypatch.setattr(shards, "write_atomically", write)
    run = predict(many, flags=FLAGS, out="cut.jsonl")
    assert run.code == 1
    assert "disk is full" in run.stderr
    assert "--resume" in run.stderr
    assert not run.out.exists()
    monkeypatch.undo()
    resumed = predict(many, flags=(*FLAGS, "--resume"), out="cut.jsonl")
    assert resumed.out.read_bytes() == whole.out.read_bytes()


@pytest.mark.fault
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file size limit as Linux has it")
def test_27_a_real_limit_on_the_size_of_files(tiny_bundle: Bundle, many: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE is what a quota looks like to a process: the final file does not fit, the shards do."""
    out = tmp_path / "cut.csv"
    script = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n" + SLOW
    code, stderr = finish(start(tiny_bundle.folder, many, "--out", out, *FLAGS, script=script))
    assert code == 1
    assert "disk is full" in stderr
    assert stderr.count("\n") == 1, stderr
    assert not out.exists()
    assert not list(tmp_path.glob(".cut*"))
    assert finish(start(tiny_bundle.folder, many, "--out", out, *FLAGS, "--resume"))[0] == 3
    assert len(out.read_text().splitlines()) == 301


def test_29_a_second_process_on_the_same_output(
    predict: Predict, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "LOCK_PATIENCE", 0.1)
    with shards.locked(tmp_path / "out" / "predictions.jsonl.parts"):
        run = predict(folder)
    assert run.code == 2
    assert "another process" in run.stderr
    assert not run.out.exists()
    assert predict(folder).code == 0, "the lock ends with its holder"


DEADLY = """
import signal, sys, threading
import ffl_deploy.images as images
real = images.decode
def decode(data, *rest):
    if data.startswith(b"deadly"):
        signal.pthread_kill(threading.get_ident(), signal.{signal})  # at once, unlike os.kill
    return real(data, *rest)
images.decode = decode
from serve.predict.command import entry
sys.argv[0] = "ffl-predict"
entry()
"""


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
@pytest.mark.fault
def test_32_an_image_that_kills_the_worker_is_quarantined(
    tiny_bundle: Bundle, many: Path, tmp_path: Path, name: str
) -> None:
    """SIGKILL is what the kernel sends when memory runs out."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert finish(start(tiny_bundle.folder, many, "--out", whole, *FLAGS))[0] == 3
    deadly = (40, 45, 200)
    for index in deadly:
        (many / f"{index:04d}.jpg").write_bytes(b"deadly")
    code, stderr = finish(
        start(tiny_bundle.folder, many, "--out", out, *FLAGS, script=DEADLY.format(signal=name))
    )
    assert code == 3, stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [index for index, row in enumerate(rows) if row["status"] == "crashed"] == list(deadly)
    before = [json.loads(line) for line in whole.read_text().splitlines()]
    others = [index for index in range(300) if index not in deadly]
    assert [rows[i]["label"] for i in others] == [before[i]["label"] for i in others]


@pytest.mark.fault
def test_32_an_image_that_kills_the_worker_of_a_part_is_quarantined(
    tiny_bundle: Bundle, many: Path, tmp_path: Path
) -> None:
    """Of a part, the shard at which a worker dies is not the next number: its neighbours are other parts'."""
    shard = int(FLAGS[FLAGS.index("--shard-size") + 1])
    deadly = shard * 4 + 5  # in the second shard of part 2/3
    (many / f"{deadly:04d}.jpg").write_bytes(b"deadly")
    out = tmp_path / "out.jsonl"
    code, stderr = finish(
        start(
            tiny_bundle.folder, many, "--out", out, *FLAGS, "--part", "2/3",
            script=DEADLY.format(signal="SIGSEGV"),
        )
    )  # fmt: skip
    assert code == 3, stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [index for index, row in enumerate(rows) if row["status"] == "crashed"] == [shard + 5]
    assert out.with_name("out.jsonl.part.json").is_file()


@pytest.mark.fault
def test_32_a_worker_killed_once_costs_nothing(tiny_bundle: Bundle, many: Path, tmp_path: Path) -> None:
    whole, out, marker = tmp_path / "whole.parquet", tmp_path / "out.parquet", tmp_path / "died"
    assert finish(start(tiny_bundle.folder, many, "--out", whole, *FLAGS))[0] == 3
    script = f"""
import os, signal, sys
from serve.inputs import items
real = items.read_file
def read_file(path):
    if path.endswith("0150.jpg") and not os.path.exists({str(marker)!r}):
        open({str(marker)!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path)
items.read_file = read_file
from serve.predict.command import entry
entry()
"""
    assert finish(start(tiny_bundle.folder, many, "--out", out, *FLAGS, script=script))[0] == 3
    assert marker.exists()
    assert out.read_bytes() == whole.read_bytes()
    assert pq.read_table(out).num_rows == 300


def test_32_a_batch_that_does_not_fit_is_halved(
    predict: Predict, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ffl_deploy.runtime import OnnxRuntimeSession

    whole = predict(many, flags=FLAGS)
    real, sizes = OnnxRuntimeSession.run, []

    def run(self: Any, images: Any) -> Any:
        sizes.append(len(images))
        if len(images) > 4:
            raise RuntimeError("Failed to allocate memory for requested buffer")
        return real(self, images)

    monkeypatch.setattr(OnnxRuntimeSession, "run", run)
    halved = predict(many, flags=FLAGS)
    assert max(sizes) == 16
    assert [row["label"] for row in halved.rows] == [row["label"] for row in whole.rows]
    assert halved.statuses == whole.statuses
