"""Does it learn what the official code learns, on this device?"""

from __future__ import annotations

import json
import sys

import numpy as np

from benchmarks.gpu_acceptance.images import unpack
from benchmarks.gpu_acceptance.report import Context, NotHere
from benchmarks.gpu_acceptance.training import run as start
from benchmarks.gpu_acceptance.training import sentence

POINTS = 0.02


def run(context: Context) -> None:
    official = context.need_official()
    if context.data is None:
        raise NotHere("needs CIFAR-100 (--data NPZ)")
    folder, result = context.work / "cifar", context.out / "learning.json"
    context.report.note(images=unpack(context.data, folder))
    epochs, seeds, images = ("4", "2", "16000") if context.gpu else ("1", "1", "1000")
    command = [
        sys.executable,
        "-m",
        "benchmarks.learn_vs_official",
        "--official",
        str(official),
        "--data",
        str(folder),
    ]
    command += ["--device", context.device, "--steps", "0", "--epochs", epochs, "--seeds", seeds]
    done = start([*command, "--images", images, "--json", str(result)])
    context.report.must("both sides learn to their end", done.returncode == 0)
    if done.returncode:
        context.report.note(said=sentence(done))
        return
    sides = json.loads(result.read_text())["learning"]
    means = {
        side: {
            name: float(np.mean([run["test"][-1][name] for run in runs])) for name in ("fused", "ensemble")
        }
        for side, runs in sides.items()
    }
    context.report.note(accuracy=means, epochs=int(epochs), seeds=int(seeds), training_images=int(images))
    if context.gpu:  # one epoch of one seed says nothing
        near = all(abs(means["ours"][name] - value) <= POINTS for name, value in means["official"].items())
        context.report.must("means within 2 points", near)
