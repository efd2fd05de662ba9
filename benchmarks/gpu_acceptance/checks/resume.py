"""A run that is stopped, or killed while it saves, ends as the run that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.numpy import load_file

from benchmarks.gpu_acceptance.report import Context
from benchmarks.gpu_acceptance.training import ROOT, module, pythonpath, sentence
from benchmarks.gpu_acceptance.training import run as start

EPOCHS = {"cpu": 6, "cuda": 8}  # enough to be stopped twice in


def run(context: Context) -> None:
    precisions = ("bf16", "fp16") if context.gpu else ("fp32",)
    with ThreadPoolExecutor(len(precisions)) as pool:
        for done in [pool.submit(one, context, precision) for precision in precisions]:
            done.result()


def one(context: Context, precision: str) -> None:
    """A run as it is, and one that is stopped, then killed, then ended."""
    report = context.report
    flags = ["--data", "digits", "--device", context.device, "--precision", precision, "--quiet"]
    flags += context.size(EPOCHS["cuda"], EPOCHS["cpu"])
    flags += ["--deterministic", "--checkpoint-minutes", "0"]
    whole, stopped = (context.work / f"resume-{precision}-{name}" for name in ("whole", "stopped"))
    done = start(module("train.run", *flags, "--out", str(whole)))
    report.must(f"{precision}: trained", done.returncode == 0)
    if done.returncode:
        report.note(**{precision: sentence(done)})
        return
    code = interrupted(module("train.run", *flags, "--out", str(stopped)), stopped, signal.SIGTERM)
    report.must(f"{precision}: SIGTERM ends with 130", code == 130)
    again = module("train.run", "--resume", str(stopped), "--quiet")
    # once more, killed at once in the middle of what it does, which with --checkpoint-minutes 0 is to save
    code = interrupted(again, stopped, signal.SIGKILL)
    report.must(f"{precision}: killed", code == -signal.SIGKILL)
    done = start(again)
    report.must(f"{precision}: resumed to the end", done.returncode == 0)
    if done.returncode:
        report.note(**{precision: sentence(done)})
        return
    for name, differ in differences(whole, stopped).items():
        report.must(f"{precision}: {name} has the same bits", not differ)
    states = [json.loads((run / "checkpoints/last/state.json").read_text()) for run in (whole, stopped)]
    report.must(f"{precision}: the same loss scale", states[0]["scaler"] == states[1]["scaler"])
    report.must(f"{precision}: the same images", states[0]["images"] == states[1]["images"])


def interrupted(command: list[str], folder: Path, how: signal.Signals, timeout: float = 300.0) -> int:
    """Start `command`, and send it `how` once another epoch of the run is finished; -> its exit code."""
    before, deadline = epochs_of(folder), time.monotonic() + timeout
    environment = {**os.environ, "PYTHONPATH": pythonpath()}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while child.poll() is None and time.monotonic() < deadline and epochs_of(folder) <= before:
        time.sleep(0.01)
    child.send_signal(how)
    return child.wait()


def epochs_of(folder: Path) -> int:
    """-> finished epochs of a run."""
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def differences(one: Path, other: Path) -> dict[str, list[str]]:
    """-> checkpoint -> tensors that differ."""
    found = {}
    for name in ("last", "best"):
        a, b = (load_file(run / "checkpoints" / name / "model.safetensors") for run in (one, other))
        found[name] = [key for key in a if a[key].tobytes() != b[key].tobytes()]
    return found
