"""Training views of images: cut, mirrored, changed, mixed; and soft labels.
Every draw comes from a generator or a seed that is handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ffl_deploy.preprocessing import Pixels
from train.config import DataOptions

Transform = Callable[[Tensor], Tensor]
"""uint8 [3, h, w] -> uint8 [3, h', w'], with draws of torch's own generator: one of torchvision's."""
POLICIES = {"randaugment": "RandAugment", "trivialaugment": "TrivialAugmentWide"}
"""--auto-augment -> the class of torchvision's v2."""


class CropDraws(NamedTuple):
    """Where each image of a batch is cut, and whether it is mirrored. top, left: int64 [b] in 0..2p;
    mirrored: bool [b]."""

    top: Tensor
    left: Tensor
    mirrored: Tensor


def draw_crops(count: int, padding: int, flip: bool, draws: torch.Generator) -> CropDraws:
    """-> the cuts of a batch of `count` images, which batches in memory and streamed ones share."""
    top, left = torch.randint(2 * padding + 1, (2, count), generator=draws)
    mirrored = (torch.rand(count, generator=draws) < 0.5) & flip
    return CropDraws(top, left, mirrored)


def crop_one(image: np.ndarray, padding: int, top: int, left: int, mirrored: bool) -> np.ndarray:
    """uint8 [h, w, 3] -> the same size: cut from the reflect-padded image, and mirrored."""
    height, width = image.shape[:2]
    if padding:
        image = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
        image = image[top : top + height, left : left + width]
    return image[:, ::-1] if mirrored else image


class RandomCrops:
    """`crop_one` for whole batches on the device that trains, by indexing (Kim et al. 2019, section IV-A).

    images: uint8 [n, 3, h, w], held padded in memory; a view of all (2p+1)^2 windows costs nothing, so a
    batch is one gather and no image is touched twice.
    """

    def __init__(self, images: Tensor, padding: int, flip: bool) -> None:
        height, width = images.shape[2:]
        self.padding, self.flip = padding, flip
        if padding:
            # Reflection needs float; a chunk at a time, into its place:
            # beside the images there is the padded copy alone.
            shape = (len(images), 3, height + 2 * padding, width + 2 * padding)
            padded = torch.empty(
                shape, dtype=torch.uint8, device=images.device, memory_format=torch.channels_last
            )
            for chunk, place in zip(images.split(1024), padded.split(1024), strict=True):
                place.copy_(functional.pad(chunk.float(), [padding] * 4, mode="reflect"))
            images = padded
        # [n, 3, choices, choices, h, w], a view
        self.windows = images.unfold(2, height, 1).unfold(3, width, 1)

    def __call__(self, draws: Tensor) -> Tensor:
        """draws: int64 [4, b] on the device of the images, rows of them and what `draw_crops` drew
        -> uint8 [b, 3, h, w]."""
        indices, top, left, mirrored = draws
        batch = self.windows[indices, :, top, left]
        return torch.where(mirrored.bool()[:, None, None, None], batch.flip(3), batch) if self.flip else batch


def changes_views(options: DataOptions) -> bool:
    """-> whether a training view is changed beyond its cut, each image in another way."""
    return options.auto_augment != "none" or options.random_erase > 0


def random_changes(options: DataOptions, fill: Sequence[float]) -> Transform | None:
    """-> torchvision's --auto-augment and --random-erase, for one image after the other; None for neither.
    fill: red, green and blue in 0..255 of pixels that are moved in or erased: the mean, 0 to the network."""
    if not changes_views(options):
        return None
    from torchvision.transforms import v2

    color, steps = [float(round(value)) for value in fill], []
    if options.auto_augment != "none":
        policy = getattr(v2, POLICIES[options.auto_augment])
        steps.append(policy(interpolation=v2.InterpolationMode.BILINEAR, fill=color))
    if options.random_erase > 0:
        steps.append(v2.RandomErasing(options.random_erase, value=color))
    return v2.Compose(steps)


def random_resized_crop(options: DataOptions, size: tuple[int, int]) -> Transform | None:
    """-> `resized-crop`: a random part of the original, resized to (height, width) (Szegedy et al. 2015), and
    mirrored, for one image after the other; None for other views."""
    if options.augment != "resized-crop":
        return None
    from torchvision.transforms import v2

    steps: list[torch.nn.Module] = [v2.RandomResizedCrop(size, antialias=True)]
    return v2.Compose([*steps, v2.RandomHorizontalFlip()] if options.flip else steps)


def transform_one(image: Pixels, transform: Transform, seed: int) -> Pixels:
    """uint8 [h, w, 3] -> uint8 [h', w', 3]. The draws are of `seed`; torch's own generator stays where it
    was."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)  # torch takes no read-only arrays
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed: Pixels = transform(pixels).permute(1, 2, 0).numpy()
    return changed


def send(values: Tensor, device: torch.device) -> Tensor:
    """-> `values` of the CPU on `device`, without waiting for what a GPU still does: from pinned memory,
    in its own order."""
    if device.type == "cpu":
        return values
    return (values.pin_memory() if torch.cuda.is_available() else values).to(device, non_blocking=True)


def shrink(images: Tensor, size: int) -> Tensor:
    """uint8 [b, 3, h, w] -> float [b, 3, h', w'] in 0..255: antialiased, the shorter side `size` pixels."""
    height, width = images.shape[2:]
    scale = size / min(height, width)
    shape = [round(height * scale), round(width * scale)]
    return functional.interpolate(images.float(), shape, mode="bilinear", antialias=True, align_corners=False)


def soften(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """int64 [n] -> float [n, classes]: 1 - smoothing on the label,
    smoothing / classes everywhere (Szegedy et al. 2016)."""
    return functional.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(
    images: Tensor, soft_labels: Tensor, options: DataOptions, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """mixup or CutMix of a batch with itself in another order; images [n, 3, h, w] float,
    soft_labels float [n, classes]."""
    kinds = [name for name, alpha in (("mixup", options.mixup), ("cutmix", options.cutmix)) if alpha > 0]
    kind = kinds[int(torch.randint(len(kinds), (), generator=draws))]
    alpha = options.mixup if kind == "mixup" else options.cutmix
    numpy_draws = np.random.default_rng(int(torch.randint(2**31, (), generator=draws)))
    share = float(numpy_draws.beta(alpha, alpha))  # torch has no seedable Beta
    order = send(torch.randperm(len(images), generator=draws), images.device)
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
        # what was really pasted, after clipping
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return images, soft_labels * share + soft_labels[order] * (1 - share)
