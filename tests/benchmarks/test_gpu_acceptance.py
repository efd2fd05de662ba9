"""The acceptance on a GPU: what carries the stages, without the stages; and on a CPU the whole road,
slowly."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.gpu_acceptance import kit
from benchmarks.gpu_acceptance.__main__ import main
from benchmarks.gpu_acceptance.checks.waits import covered
from benchmarks.gpu_acceptance.images import decoded, pack, unpack
from benchmarks.gpu_acceptance.page import PAGE, joined, page, results_of, stored
from benchmarks.gpu_acceptance.page import main as page_main
from benchmarks.gpu_acceptance.report import Report
from benchmarks.gpu_acceptance.runner import Settings, beside, run_stages, store, worst
from benchmarks.gpu_acceptance.stages import STAGES, Stage
from ffl_deploy.command import run_command
from ffl_deploy.errors import UsageError

REPORT = """
import sys, time, os, subprocess
from pathlib import Path
from benchmarks.gpu_acceptance.report import Report
report = Report(Path(sys.argv[1]))
"""
WAITS = """
Path(report.path.parent / {0!r}).touch()
while not Path(report.path.parent / {1!r}).exists():
    time.sleep(0.02)
report.must("both run", True)
"""
CODES = {
    "good": "report.note(device='cpu', speed=2.5); report.must('it works', True)",
    "bad": "report.must('it works', True); report.must('it is fast', False)",
    "broken": "report.note(so_far=1); sys.exit('a sentence')",
    "crashed": "report.note(so_far=1); os.abort()",
    "slow": "report.note(so_far=1); print(subprocess.Popen(['sleep', '99']).pid, flush=True); time.sleep(99)",
    "lacking": "print('needs the official code'); sys.exit(77)",
    "one": WAITS.format("one", "other"),
    "other": WAITS.format("other", "one"),
    "partly": "report.leave_out('fp16: needs a GPU')",
}


class Fakes(Settings):
    """Stages of a line of Python each."""

    def command(self, stage: Stage, device: str) -> list[str]:
        path = self.out / "stages" / f"{stage.name}.json"
        return [sys.executable, "-c", REPORT + CODES[stage.name], str(path)]


def run(out: Path, *names: str, limit: int = 60) -> dict[str, dict[str, object]]:
    stages = [Stage(name, limit, False, "", "") for name in names]
    lines = run_stages(stages, Fakes(out, len(stages) * limit / 60))
    store(lines, Fakes(out, 1))
    return {str(line["stage"]): line for line in lines}


def test_a_stage_that_fails_or_lacks_something_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(tmp_path, "bad", "broken", "crashed", "lacking", "partly", "good")
    assert {name: line["status"] for name, line in lines.items()} == {
        "bad": "failed", "broken": "failed", "crashed": "failed",
        "lacking": "not run", "partly": "ok", "good": "ok",
    }  # fmt: skip
    assert lines["bad"]["why"] == "does not hold: it is fast"
    assert lines["broken"]["why"] == "ended with 1: a sentence"
    assert str(lines["crashed"]["why"]).startswith("ended with -6")
    assert lines["lacking"]["why"] == "needs the official code"
    assert lines["crashed"]["found"] == {"so_far": 1}
    assert lines["good"]["found"] == {"device": "cpu", "speed": 2.5}
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kept = [json.loads(line) for line in (tmp_path / "acceptance.jsonl").read_text().splitlines()]
    assert printed == kept == list(lines.values())
    assert json.loads((tmp_path / "acceptance.json").read_text())["stages"] == kept


def test_a_stage_over_its_limit_ends_with_all_that_it_started(tmp_path: Path) -> None:
    begun = time.monotonic()
    line = run(tmp_path, "slow", limit=8)["slow"]
    assert time.monotonic() - begun < 60
    assert (line["status"], line["why"]) == ("failed", "over its limit of 8 s")
    assert line["found"] == {"so_far": 1}
    left = int((tmp_path / "logs" / "slow.txt").read_text())
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{left}") and time.monotonic() < deadline:
        if Path(f"/proc/{left}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_without_a_gpu_a_stage_that_needs_one_is_not_even_begun(tmp_path: Path) -> None:
    stages = [Stage("good", 60, False, "", ""), Stage("broken", 60, True, "", "")]
    lines = run_stages(stages, Fakes(tmp_path, 2))  # "good" found that the device is a CPU
    assert [(line["status"], line["why"]) for line in lines] == [
        ("ok", ""),
        ("not run", "needs an NVIDIA GPU"),
    ]
    assert lines[1]["seconds"] == 0


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (1, ["a", "b", "c", "d", "e"]),
        (2, ["a", "b", "c", "d", "e"]),
        (4, ["a", "bc", "d", "e"]),
        (9, ["a", "bcd", "e"]),
    ],
)
def test_stages_that_measure_nothing_run_beside_each_other(cores: int, expected: list[str]) -> None:
    stages = [Stage(name, 1, False, "", "", alone=name in "ae") for name in "abcde"]
    assert ["".join(stage.name for stage in group) for group in beside(stages, cores)] == expected


def test_stages_beside_each_other_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    stages = [Stage(name, 60, False, "", "", alone=False) for name in ("one", "other")]
    lines = run_stages(stages, Fakes(tmp_path, 1))
    assert [(line["stage"], line["status"]) for line in lines] == [("one", "ok"), ("other", "ok")]


def test_no_stage_begins_when_no_time_is_left(tmp_path: Path) -> None:
    lines = run_stages([Stage("good", 60, False, "", "")], Fakes(tmp_path, 0.01))
    assert lines[0]["why"] == "no time is left"


@pytest.mark.parametrize(
    ("statuses", "left_out", "expected"),
    [
        (["ok", "ok"], [], 0),
        (["ok", "not run"], [], 3),
        (["not run", "failed"], [], 1),
        (["ok"], ["fp16"], 3),
    ],
)
def test_the_exit_code_is_the_worst(statuses: list[str], left_out: list[str], expected: int) -> None:
    assert worst([{"status": status, "left_out": left_out} for status in statuses]) == expected


def test_every_stage_has_its_module_and_they_fit_into_nine_minutes() -> None:
    assert len(STAGES) == 13
    groups = beside(STAGES, 16)
    assert [len(group) for group in groups] == [1, 6, 1, 1, 1, 1, 1, 1]
    assert sum(max(stage.limit for stage in group) for group in groups) <= 9 * 60
    for stage in STAGES:
        assert callable(importlib.import_module(f"benchmarks.gpu_acceptance.checks.{stage.name}").run)


def test_what_is_missing_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--out", str(tmp_path), "--data", str(tmp_path / "no.npz")]) == 2
    assert "make gpu-kit" in capsys.readouterr().err


def test_a_check_that_failed_once_has_failed(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")
    for holds in (True, False, True):
        report.must("it works", holds)
    assert json.loads(report.path.read_text())["checks"] == {"it works": False}


def test_busy_time_is_counted_once() -> None:
    assert covered([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7
    assert covered([]) == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draws = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 2)):
        for name in ("ant", "bee"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = Image.fromarray(draws.integers(0, 256, (32, 32, 3), np.uint8))
                pixels.save(tmp_path / "images" / part / name / f"{number}.webp", lossless=True)
    return tmp_path / "images"


def test_packed_images_are_the_files_again(folder: Path, tmp_path: Path) -> None:
    pack(folder, {"train": 4, "test": 4}, tmp_path / "cifar.npz")
    assert unpack(tmp_path / "cifar.npz", tmp_path / "again") == 8
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            kept = sorted((folder / part / name).iterdir())[:2]
            again = sorted((tmp_path / "again" / part / name).iterdir())
            assert [path.read_bytes() for path in again] == [path.read_bytes() for path in kept]
    data = decoded(tmp_path / "cifar.npz", 1)
    assert (data.classes, data.train.labels.tolist(), len(data.test)) == (("ant", "bee"), [0, 1], 2)
    expected = np.asarray(Image.open(folder / "train" / "bee" / "0.webp").convert("RGB"))
    assert np.array_equal(data.train.images[1], expected)


def test_the_kit_holds_what_was_given_and_is_small(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kit, "download", lambda target, python, constraints: target.mkdir())
    monkeypatch.setattr(kit, "IMAGES", {"train": 4, "test": 2})
    clone = tmp_path / "clone"
    clone.mkdir()
    flags = ["--out", str(tmp_path / "kit"), "--data", str(folder), "--official", str(clone)]
    assert run_command(kit.main, flags) == 2
    assert "is no clone of Jangho-Kim/FFL-pytorch" in capsys.readouterr().err
    for name in kit.OFFICIAL:
        (clone / name).write_text("")
    assert run_command(kit.main, flags) == 0
    names = {path.relative_to(tmp_path / "kit").as_posix() for path in (tmp_path / "kit").rglob("*")}
    assert names == {
        "wheels",
        "cifar.npz",
        "official",
        "run.sh",
        *(f"official/{name}" for name in kit.OFFICIAL),
    }
    assert os.access(tmp_path / "kit" / "run.sh", os.X_OK)
    monkeypatch.setattr(kit, "MOST", 10)
    assert run_command(kit.main, flags) == 1
    assert "pack fewer images" in capsys.readouterr().err


LINE = {
    "stage": "speed",
    "status": "failed",
    "why": "does not hold: x|y",
    "seconds": 61.4,
    "left_out": ["fp16"],
}


def test_the_page_has_the_numbers_of_the_file_and_says_what_is_absent(tmp_path: Path) -> None:
    found = {"bf16, 128": {"ms": 1.23456, "quartiles": [1.2, 1.3]}, "auto": None}
    empty = {**LINE, "stage": "bound", "status": "not run", "found": {}, "checks": {}}
    lines = [{**LINE, "found": found, "checks": {"it is fast": False, "it runs": True}}, empty]
    text = results_of({"date": "2026-01-02", "machine": {"gpu": "NVIDIA X"}, "stages": lines})
    assert "2026-01-02, NVIDIA X" in text
    assert "| speed | failed | 61 | does not hold: x\\|y; fp16 |" in text
    assert "- bf16, 128: ms 1.235, quartiles 1.2, 1.3" in text
    assert "- auto: not measured" in text
    assert "- **does not hold**: it is fast\n- holds: it runs" in text
    assert text.endswith("### bound\n\nNot measured.")
    assert "Not measured yet" in page(None)


def test_the_committed_page_is_made_of_the_committed_file() -> None:
    assert PAGE.read_text() == page(stored())


def test_of_several_runs_every_stage_is_the_last_that_ran() -> None:
    def run(gpu: str, **statuses: str) -> dict[str, object]:
        lines = [
            {"stage": name, "status": status.split()[0], "seconds": float(status.split()[1])}
            for name, status in statuses.items()
        ]
        return {"date": "2026-01-02", "machine": {"gpu": gpu}, "stages": lines}

    runs = [
        run("X", speed="failed 1", waits="ok 2", bound="ok 3"),
        run("X", bound="failed 4", machine="ok 5"),
    ]
    runs.append({**run("X", speed="ok 6"), "date": "2026-01-03"})
    found = joined(runs)
    assert (found["date"], found["runs"]) == ("2026-01-03", 3)
    assert [line["stage"] for line in found["stages"]] == [stage.name for stage in STAGES]
    seconds = {line["stage"]: line["seconds"] for line in found["stages"] if line["status"] != "not run"}
    assert list(seconds.items()) == [("machine", 5), ("speed", 6), ("waits", 2), ("bound", 4)]
    again = joined([found, run("X", waits="ok 9")])  # with what is stored
    assert again["runs"] == 4
    assert [line["seconds"] for line in again["stages"] if line["stage"] in ("speed", "waits")] == [6, 9]
    with pytest.raises(UsageError, match="different GPUs \\(X, Y\\)"):
        joined([*runs, run("Y", speed="ok 1")])


def test_a_run_without_a_gpu_does_not_become_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "acceptance.json").write_text(
        json.dumps({"date": "", "machine": {"device": "cpu"}, "stages": []})
    )
    before = PAGE.read_text()
    assert run_command(page_main, [str(tmp_path)]) == 2
    assert "a machine without a GPU" in capsys.readouterr().err
    assert PAGE.read_text() == before


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    """No stage fails; those that need a GPU say so."""
    code = run_command(main, ["--out", str(tmp_path), "--device", "cpu", "--minutes", "55"])
    lines = json.loads((tmp_path / "acceptance.json").read_text())["stages"]
    assert {line["stage"]: line["why"] for line in lines if line["status"] == "failed"} == {}
    assert [line["stage"] for line in lines] == [stage.name for stage in STAGES]
    assert code == 3


def test_the_kit_installs_its_wheels_apart_and_hands_on_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "kit" / "wheels").mkdir(parents=True)
    (tmp_path / "kit" / "wheels" / "a.whl").touch()
    (tmp_path / "kit" / "cifar.npz").touch()
    script = Path(kit.__file__).with_name("run.sh")
    (tmp_path / "kit" / "run.sh").write_text(script.read_text())
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "${PYTHONPATH:-none} $*" >> "$CALLS"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    command = ["sh", str(tmp_path / "kit" / "run.sh"), str(tmp_path / "out"), "--minutes", "3"]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    install, start = (tmp_path / "calls").read_text().splitlines()
    site = tmp_path / "out" / "site"
    assert install.startswith("none -m pip install")
    assert "--no-index" in install
    assert install.endswith(f"--target {site} {tmp_path}/kit/wheels/a.whl")
    assert start == (
        f"{site}:{tmp_path} -m benchmarks.gpu_acceptance --out {tmp_path}/out "
        f"--data {tmp_path}/kit/cifar.npz --minutes 3"
    )
