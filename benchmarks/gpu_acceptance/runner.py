"""Runs the stages, each in a process of its own, and collects their lines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_acceptance.stages import Stage
from ffl_deploy.files import write_atomically

LEAST = 3  # seconds below which a stage is not begun
TAIL = 400  # characters of a stage's last words


@dataclass(frozen=True)
class Settings:
    """What every stage is handed. minutes: for all of them; limits are shares of nine."""

    out: Path
    minutes: float
    device: str = "auto"
    data: Path | None = None
    official: Path | None = None

    def command(self, stage: Stage, device: str) -> list[str]:
        words = [sys.executable, "-m", "benchmarks.gpu_acceptance", "--stage", stage.name]
        words += ["--out", str(self.out), "--device", device]
        for flag, value in (("--data", self.data), ("--official", self.official)):
            words += [flag, str(value)] if value else []
        return words


def run_stages(stages: Sequence[Stage], settings: Settings) -> list[dict[str, Any]]:
    """-> a line per stage, which were also printed and stored as they came."""
    started, device, lines = time.monotonic(), settings.device, []
    groups = beside(stages, len(os.sched_getaffinity(0)))
    share = 60 * settings.minutes / sum(max(stage.limit for stage in group) for group in groups)
    for name in ("stages", "logs", "work"):
        (settings.out / name).mkdir(parents=True, exist_ok=True)
    (settings.out / "acceptance.jsonl").write_text("")
    for group in groups:
        left = 60 * settings.minutes - (time.monotonic() - started)
        with ThreadPoolExecutor(len(group)) as pool:
            limits = [min(stage.limit * share, left) for stage in group]
            running = [
                pool.submit(run_or_not, stage, settings, device, limit, len(group))
                for stage, limit in zip(group, limits, strict=True)
            ]
            for done in running:
                line = done.result()
                device = line["found"].get("device", device) if device == "auto" else device
                lines.append(line)
                print(json.dumps(line), flush=True)
                with open(settings.out / "acceptance.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
    return lines


def beside(stages: Sequence[Stage], cores: int) -> list[list[Stage]]:
    """-> the stages in order, in groups that run at once: of those that need not be alone, one for every two
    cores."""
    groups: list[list[Stage]] = []
    for stage in stages:
        last = groups[-1] if groups else []
        if last and not stage.alone and not last[0].alone and len(last) < max(1, cores // 2):
            last.append(stage)
        else:
            groups.append([stage])
    return groups


def run_or_not(
    stage: Stage, settings: Settings, device: str, limit: float, neighbours: int
) -> dict[str, Any]:
    """Run a stage where that makes sense; -> its line. neighbours: how many run at once, itself counted."""
    if stage.needs_gpu and device == "cpu":
        return not_run(stage, "needs an NVIDIA GPU")
    if limit < LEAST:
        return not_run(stage, "no time is left")
    return run_stage(stage, settings, device, limit, neighbours)


def not_run(stage: Stage, why: str) -> dict[str, Any]:
    return {
        "stage": stage.name, "status": "not run", "why": why, "seconds": 0.0,
        "found": {}, "checks": {}, "left_out": [],
    }  # fmt: skip


def run_stage(stage: Stage, settings: Settings, device: str, limit: float, neighbours: int) -> dict[str, Any]:
    """Run one; -> its line. Whatever it started ends with it."""
    path, log = settings.out / "stages" / f"{stage.name}.json", settings.out / "logs" / f"{stage.name}.txt"
    path.unlink(missing_ok=True)
    begun, environment = time.monotonic(), dict(os.environ)
    if neighbours > 1:  # threads that wait for each other's cores take many times as long
        threads = len(os.sched_getaffinity(0)) // (2 * neighbours)
        environment["OMP_NUM_THREADS"] = str(max(1, threads))
    with open(log, "wb") as file:
        child = subprocess.Popen(
            [*settings.command(stage, device), "--seconds", f"{limit:.0f}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(child)
    line = not_run(stage, "") | {"seconds": round(time.monotonic() - begun, 1)}
    if path.is_file():
        line |= json.loads(path.read_text())
    failed = [text for text, holds in line["checks"].items() if not holds]
    if code is None:
        return line | {"status": "failed", "why": f"over its limit of {limit:.0f} s"}
    if code == NOT_HERE:
        return line | {"status": "not run", "why": last_words(log)}
    if code:
        return line | {"status": "failed", "why": f"ended with {code}: {last_words(log)}"}
    if failed:
        return line | {"status": "failed", "why": "does not hold: " + "; ".join(failed)}
    return line | {"status": "ok"}


NOT_HERE = 77  # what a stage ends with where the machine lacks what it needs


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End the stage and what it left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def last_words(log: Path) -> str:
    """-> the last line that a stage wrote."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-TAIL:] if lines else "it said nothing"


def worst(lines: Sequence[dict[str, Any]]) -> int:
    """-> 1 where a stage failed, else 3 where one, or a part of one, could not run, else 0."""
    if any(line["status"] == "failed" for line in lines):
        return 1
    return 3 if any(line["status"] == "not run" or line["left_out"] for line in lines) else 0


def store(lines: Sequence[dict[str, Any]], settings: Settings) -> None:
    """Leave acceptance.json, which page.py takes."""
    machine = next((line["found"] for line in lines if line["stage"] == "machine"), {})
    content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "stages": list(lines)}
    write_atomically(settings.out / "acceptance.json", json.dumps(content, indent=1) + "\n")
