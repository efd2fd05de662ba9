"""What a newcomer would ask about own photographs: is the network right for so many, is the size, is the
result more than chance; each answered with what to type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ffl_deploy.data.datasets import ImageData
from ffl_deploy.data.folders import median_side
from ffl_deploy.data.inputs import LABELS
from ffl_deploy.images import UNREADABLE
from ffl_deploy.installed import install_command
from ffl_deploy.statistics import wilson_interval
from train.config import TrainConfig

FEW = 5000
"""Training images below which published weights are the advice: they have seen a million, and none of these
classes has enough."""
PUBLISHED_SIZES = (64, 96, 128, 160, 192, 224)
"""Sides for networks whose weights were trained at 224 pixels; smaller is faster and less accurate."""
UNEQUAL = 0.02
"""Accuracy over all images minus that over classes, from which it is worth a line."""
COARSE = 3
"""How many times larger photographs may be than the network's input before it is worth a line."""


def advice(config: TrainConfig, data: ImageData) -> list[str]:
    """-> lines about a folder's images, before training; none about data sets that come with a recipe."""
    if data.inputs is None:
        return []
    lines = []
    if data.split_here:
        lines.append(
            f"{config.data.source} holds no test images of its own: a fifth of each class was held out for "
            "the test, equal pictures together"
        )
    lines += _formats(data.left_out)
    if config.output.resume is not None or config.model.quantize_aware is not None:
        return lines
    size = data.preprocessing.width
    parts = [part for name, part in data.inputs.parts.items() if name != LABELS]
    side = max((median_side(part.files) for part in parts), default=0)
    better = max((one for one in PUBLISHED_SIZES if one <= side), default=0)
    begun = config.model.pretrained or config.model.weights
    if len(data.train) < FEW and not begun and better:
        names = ",".join(["torchvision:resnet18"] * max(2, len(config.model.branches)))
        lines.append(
            f"{len(data.train):,} photographs are few for a network that knows nothing yet; one that starts "
            f"from published weights learns more from them: ffl-train --data {config.data.source} "
            f"--branches {names} --pretrained --image-size {min(better, 128)}"
        )
    elif side >= COARSE * size and config.data.image_size is None and better:
        lines.append(
            f"photographs of about {side} pixels are read at {size}x{size}; for finer detail, which takes "
            f"longer: --image-size {min(better, 2 * size)}"
        )
    return lines


def _formats(left_out: Mapping[str, int]) -> list[str]:
    lines = []
    for one in UNREADABLE:
        count = sum(left_out.get(f"called {suffix}", 0) for suffix in one.suffixes)
        if count:
            how = f"run: {install_command(one.extra)}" if one.extra else "update Pillow"
            lines.append(f"{count} of these are {one.name} photographs, which can be read; {how}")
    return lines


RARE = 0.7
"""Of the mean number of images: a class with fewer is rare."""


def unequal_classes(summary: Mapping[str, Any], labels: np.ndarray) -> list[str]:
    """-> lines about classes that are told badly, which an accuracy over all images hides.

    summary: of a finished run; labels: int64 [n], of the test images.
    """
    lines = []
    for names in {tuple(names): None for names in summary["never_predicted"].values()}:
        by = [name for name, found in summary["never_predicted"].items() if tuple(found) == names]
        images = np.bincount(labels, minlength=len(summary["classes"])).tolist()
        counts = dict(zip(summary["classes"], images, strict=True))
        shown = ", ".join(f"{name} ({counts[name]} test images)" for name in names[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        rare = any(counts[name] < RARE * len(labels) / len(counts) for name in names)
        advice = "add images of what is rare, or give it more weight: --balance weights"
        lines.append(
            f"never predicted by {', '.join(by)}: {shown}{more}; "
            f"{advice if rare else 'they are no rarer than the others: train longer, or on more images'}"
        )
    name = next(iter(summary["accuracy"]))
    accuracy, macro = summary["accuracy"][name], summary["macro_accuracy"][name]
    if accuracy - macro >= UNEQUAL:
        worst = min(summary["recall"][name].items(), key=lambda one: (one[1], one[0]))
        lines.append(
            f"each class counted alike, {name} is right for {100 * macro:.2f} %: least for {worst[0]}, of "
            f"which {100 * worst[1]:.1f} % are told"
        )
    return lines


def no_better_than_chance(accuracy: Mapping[str, float], labels: np.ndarray, classes: int) -> str:
    """-> a sentence where no classifier is surely better than always naming the most frequent class; else ''.

    accuracy: share of 1 of each classifier; labels: int64 [n], of the test images.
    """
    chance = float(np.bincount(labels, minlength=classes).max() / len(labels))
    best = max(accuracy.values())
    if wilson_interval(round(best * len(labels)), len(labels)).low > chance:
        return ""
    return (
        f"{100 * chance:.0f} % is chance for {classes} classes of these test images, and nothing here is "
        "surely above it: train longer (--epochs), start from published weights (--pretrained), or look "
        "whether the folders' names fit what is in them."
    )
