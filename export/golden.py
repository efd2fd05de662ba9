"""The golden samples of a bundle: images with PyTorch's logits, by which it is verified wherever it goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from export.check.evaluation import Reference, class_balanced
from export.write.onnx_graph import DeployedModel
from ffl_deploy.bundle_files import GoldenSamples
from ffl_deploy.errors import UsageError
from ffl_deploy.images import SUFFIXES, ImageError, load
from ffl_deploy.run_directory import Run

GOLDEN_IMAGES = 64
GOLDEN_BYTES = 8 << 20  # of pixels; large images get fewer samples, so that a bundle stays light


def golden_samples(
    model: DeployedModel, reference: Reference, own: dict[str, np.ndarray] | None, run: Run
) -> GoldenSamples:
    """-> `own` images with PyTorch's logits and labels unknown (-1), else class-balanced ones
    of training's evaluation.

    own: file name -> image uint8 [height, width, 3].
    """
    import torch

    if own is None:
        chosen = class_balanced(reference.labels, golden_limit(run))
        return GoldenSamples(reference.images[chosen], reference.labels[chosen], reference.logits[chosen])
    images = np.stack(list(own.values()))
    with torch.inference_mode():
        logits = model(torch.from_numpy(images))[0].numpy()
    return GoldenSamples(images, np.full(len(images), -1, dtype=np.int64), logits)


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
