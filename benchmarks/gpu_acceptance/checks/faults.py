"""Accidents end with one sentence and the documented exit code, and give the GPU's memory back."""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.gpu_acceptance.report import Context
from benchmarks.gpu_acceptance.training import module
from benchmarks.gpu_acceptance.training import run as start
from train.data.augment import RandomCrops

IMAGES = 2**20
# Free memory, which training asks for before its first step, says nothing of this limit: a step meets it.
LITTLE_MEMORY = """
import torch, train.session
choose = train.session.choose_device
def choose_device(*arguments):
    device = choose(*arguments)
    torch.cuda.set_per_process_memory_fraction(0.01, device)
    return device
train.session.choose_device = choose_device
from train.run import entry
entry()
"""


class Accident(NamedTuple):
    """command and flags of a training that ends with `code` and a sentence that holds `words`."""

    command: list[str]
    flags: list[str]
    code: int
    words: str


def run(context: Context) -> None:
    before, train = free(context), module("train.run")
    accidents = {"NaN": Accident(train, ["--lr", "1e6"], 1, "not finite")}
    if context.gpu:
        large = ["--image-size", "64", "--branches", "resnet32,resnet32", "--batch-size", "1024"]
        little = [sys.executable, "-c", LITTLE_MEMORY]
        accidents["out of memory"] = Accident(little, [*large, "--cuda-graph", "off"], 1, "out of memory")
        million = ["--image-size", "64", "--batch-size", "1000000"]
        accidents["a batch of a million"] = Accident(train, million, 2, "are free")
    else:
        context.report.leave_out("out of memory: needs a GPU")
    for name, (command, flags, code, words) in accidents.items():
        digits = ["--data", "digits", "--device", context.device, "--quiet", *context.size(2, 2), *flags]
        out = context.work / f"fault-{name.replace(' ', '-')}"
        done = start([*command, *digits, "--precision", "fp32", "--out", str(out)])
        lines = [line for line in done.stderr.splitlines() if "error:" in line]
        context.report.note(**{name: done.stderr.strip().splitlines()[-1:]})
        context.report.must(f"{name}: exit code {code}", done.returncode == code)
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
