"""Accidents end with one sentence and exit code 1, and give the GPU's memory back."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.gpu_acceptance.report import Context
from benchmarks.gpu_acceptance.training import module
from benchmarks.gpu_acceptance.training import run as start
from train.data.augment import RandomCrops

IMAGES = 2**20


def run(context: Context) -> None:
    before = free(context)
    digits = ["--data", "digits", "--device", context.device, "--quiet", *context.size(2, 2)]
    wanted = {"NaN": (["--lr", "1e6", "--precision", "fp32"], "not finite")}
    if context.gpu:
        large = ["--image-size", "256", "--branches", "resnet110,resnet110", "--batch-size", "1000000"]
        wanted["out of memory"] = ([*large, "--precision", "fp32"], "out of memory")
    else:
        context.report.leave_out("out of memory: needs a GPU")
    for name, (flags, words) in wanted.items():
        out = context.work / f"fault-{name.replace(' ', '-')}"
        done = start(module("train.run", *digits, *flags, "--out", str(out)))
        lines = [line for line in done.stderr.splitlines() if "error:" in line]
        context.report.note(**{name: done.stderr.strip().splitlines()[-1:]})
        context.report.must(f"{name}: exit code 1", done.returncode == 1)
        context.report.must(f"{name}: one sentence", len(lines) == 1 and words in lines[0])
        context.report.must(f"{name}: no traceback", "Traceback" not in done.stderr)
    if context.gpu:
        after = free(context)
        context.report.note(free_before_mib=before >> 20, free_after_mib=after >> 20)
        context.report.must("the memory is free again", after >= 0.98 * before)
        padded(context)


def free(context: Context) -> int:
    return int(torch.cuda.mem_get_info()[0]) if context.gpu else 0


def padded(context: Context) -> None:
    """The padded copy of the images is made without a second one beside it."""
    images = torch.from_numpy(np.zeros((IMAGES, 32, 32, 3), np.uint8)).to("cuda").permute(0, 3, 1, 2)
    torch.cuda.reset_peak_memory_stats()
    RandomCrops(images, 4, True)
    peak = torch.cuda.max_memory_allocated() / images.nbytes
    context.report.note(images_bytes=images.nbytes, peak_over_images=round(peak, 2))
    context.report.must("at its peak 2.6 times the images", peak < 2.7)
