"""Training views of image batches, whole batches at a time, on the device that trains."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from train.config import DataOptions


class RandomCrops:
    """Random cuts from reflect-padded images with mirroring, by indexing (Kim et al. 2019, section IV-A).

    images: uint8 [n, 3, h, w], held padded in memory; a view of all (2p+1)^2 windows costs nothing, so a batch is
    one gather and no image is touched twice.
    """

    def __init__(self, images: Tensor, padding: int, flip: bool) -> None:
        height, width = images.shape[2:]
        self.flip, self.choices = flip, 2 * padding + 1
        if padding:
            # Reflection needs float or chunks; one chunk at a time keeps the peak at the padded copy itself.
            chunks = [
                functional.pad(chunk.float(), [padding] * 4, mode="reflect").to(torch.uint8) for chunk in images.split(1024)
            ]
            images = torch.cat(chunks)
        self.windows = images.unfold(2, height, 1).unfold(3, width, 1)  # [n, 3, choices, choices, h, w], a view

    def __call__(self, indices: Tensor, draws: torch.Generator) -> Tensor:
        """indices: int64 [b] on the CPU -> uint8 [b, 3, h, w]."""
        top, left = torch.randint(self.choices, (2, len(indices)), generator=draws)
        mirrored = torch.rand(len(indices), generator=draws) < 0.5
        device = self.windows.device
        batch = self.windows[indices.to(device), :, top.to(device), left.to(device)]
        if self.flip:
            batch = torch.where(mirrored.to(device)[:, None, None, None], batch.flip(3), batch)
        return batch


def soften(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """int64 [n] -> float [n, classes]: 1 - smoothing on the label, smoothing / classes everywhere (Szegedy et al. 2016)."""
    return functional.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(images: Tensor, targets: Tensor, options: DataOptions, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """mixup or CutMix of a batch with itself in another order; images [n, 3, h, w] float, targets float [n, classes]."""
    kinds = [name for name, alpha in (("mixup", options.mixup), ("cutmix", options.cutmix)) if alpha > 0]
    kind = kinds[int(torch.randint(len(kinds), (), generator=draws))]
    alpha = options.mixup if kind == "mixup" else options.cutmix
    numpy_draws = np.random.default_rng(int(torch.randint(2**31, (), generator=draws)))
    share = float(numpy_draws.beta(alpha, alpha))  # torch has no seedable Beta
    order = torch.randperm(len(images), generator=draws).to(images.device)
    if kind == "mixup":
        images = images * share + images[order] * (1 - share)
    else:
        height, width = images.shape[2:]
        cut = (1 - share) ** 0.5
        row, column = numpy_draws.integers(height), numpy_draws.integers(width)
        top, bottom = (int(np.clip(row + sign * cut * height / 2, 0, height)) for sign in (-1, 1))
        left, right = (int(np.clip(column + sign * cut * width / 2, 0, width)) for sign in (-1, 1))
        images = images.clone()
        images[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)  # what was really pasted, after clipping
    return images, targets * share + targets[order] * (1 - share)
