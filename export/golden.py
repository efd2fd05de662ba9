"""The golden samples of a bundle: images with PyTorch's logits, by which it is verified wherever it goes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.cascade import clear_of
from export.check.evaluation import Reference, class_balanced
from export.write.onnx_graph import DeployedModel
from ffl_deploy.bundle_files import GoldenSamples
from ffl_deploy.errors import UsageError
from ffl_deploy.images import SUFFIXES, ImageError, load
from ffl_deploy.parity import PARITY_GATES
from ffl_deploy.probes import Probes
from ffl_deploy.run_directory import Run

if TYPE_CHECKING:
    from torch import nn

GOLDEN_IMAGES = 64
GOLDEN_BYTES = 8 << 20  # of pixels; large images get fewer samples, so that a bundle stays light

ROUNDING = (PARITY_GATES["fp32"].scaled_max_diff or 0.0) / 4
"""What PyTorch's rounding alone may be on a made-up picture, as a share of the logits' standard deviation."""


def golden_samples(
    model: DeployedModel,
    reference: Reference,
    own: dict[str, np.ndarray] | None,
    run: Run,
    margins: np.ndarray | None = None,
) -> GoldenSamples:
    """-> `own` images with PyTorch's logits and labels unknown (-1), else class-balanced ones
    of training's evaluation.

    own: file name -> image uint8 [height, width, 3]; margins: see golden_rows.
    """
    import torch

    if own is None:
        chosen = golden_rows(reference.labels, golden_limit(run), margins)
        return GoldenSamples(reference.images[chosen], reference.labels[chosen], reference.logits[chosen])
    images = np.stack(list(own.values()))
    with torch.inference_mode():
        logits = model(torch.from_numpy(images))[0].numpy()
    return GoldenSamples(images, np.full(len(images), -1, dtype=np.int64), logits)


def golden_rows(labels: np.ndarray, limit: int, margins: np.ndarray | None = None) -> np.ndarray:
    """-> sorted rows of at most `limit` images, equally many of each class as far as they go.

    margins [n]: of a cascade, how far each image is from the other exit (Exits.margins). Half of the rows
    leave by each exit, or what there is of it, and are such that rounding does not change that (clear_of): at
    the threshold another classifier's answer may be the right one.
    """
    if margins is None:
        return class_balanced(labels, limit)
    clear = clear_of(margins)
    sides = [np.flatnonzero(clear & side) for side in (margins < 0, margins >= 0)]
    last = min(len(sides[0]), max(limit // 2, limit - len(sides[1])))
    counts = (last, limit - last)
    chosen = [rows[class_balanced(labels[rows], count)] for rows, count in zip(sides, counts, strict=True)]
    return np.sort(np.concatenate(chosen))


def determined(probes: Probes, model: nn.Module, scale: float) -> Probes:
    """-> `probes`, with NaN for the logits of pictures of which fp32 does not say what they are: no runtime
    could be held to those. A little trained network may amplify noise until rounding shows (an EfficientNet
    after one epoch: by a tenth of the standard deviation, in PyTorch itself).

    model: uint8 images -> logits and further outputs, in fp32; scale: the logits' standard deviation on the
    run's own images.
    """
    import torch

    images = torch.from_numpy(probes.pixels)
    with torch.inference_mode():
        logits = model(images)[0].double().numpy()
        try:
            exact = copy.deepcopy(model).double()(images)[0].numpy()
        except RuntimeError:  # a network with fp32 written into it cannot be asked; its gate stays whole
            return probes
    off = np.abs(exact - logits).max(axis=1) / scale
    known = off <= ROUNDING
    return probes._replace(logits=np.where(known[:, None], probes.logits, np.float32(np.nan)))


def read_golden(folder: Path, run: Run) -> dict[str, np.ndarray]:
    """-> file name -> image uint8 [height, width, 3], the first ones by name. Raises UsageError for an
    unusable folder."""
    if not folder.is_dir():
        raise UsageError(f"--golden {folder}: there is no such folder; give one with image files.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[: golden_limit(run)]
    if not paths:
        raise UsageError(f"--golden {folder}: no image files ({', '.join(SUFFIXES)}) in it.")
    try:
        return {path.name: load(path, run.preprocessing) for path in paths}
    except ImageError as error:
        raise UsageError(f"--golden {folder}: an image cannot be used ({error}); remove it.") from error


def golden_limit(run: Run) -> int:
    """-> how many images of the run's size are kept."""
    image_bytes = 3 * run.preprocessing.height * run.preprocessing.width
    return max(1, min(GOLDEN_IMAGES, GOLDEN_BYTES // image_bytes))
