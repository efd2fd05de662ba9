"""The output `familiarity`: how much an image is like those that the network was trained on.

Two things, each in standard deviations over training images, added up. How sure the classifier is: minus the
logarithm of its softmax's entropy. And what the picture is made of: how much farther than training images
usually do its map before the first branch's last stage lies from the nearest class's mean (Mahalanobis
distance with one covariance for all classes: Lee et al. 2018). The features that the last stages give know
objects and forget what a picture is made of: uniform noise is a class to them. An earlier map still has that,
and knows nothing else: photographs of other classes lie no farther than these, so that only what is beyond
the usual counts. docs/decisions.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ffl_deploy.familiarity import Familiarity, Separation

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 0.95
"""Share of held-out images that stay familiar."""
FIT_IMAGES = 2048
BEYOND = 1.5
"""Standard deviations above the mean distance of training images from which a distance counts."""
LEAST_ENTROPY = 0.01
"""Nats that are added to every entropy: surer than this makes no difference, and rounding no noise."""
SHRINKAGE = 0.1
"""Share of the mean variance that is added to each feature's own: a covariance of more features than there
are images has no inverse."""


def fitted(early: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """-> the constants of `familiarity`, from training images: their pooled earlier maps [n, channels],
    logits [n, classes], labels int64 [n]."""
    import torch

    # class means, and one covariance around them
    features = early.double()
    classes, of_image = labels.unique(return_inverse=True)
    centre = features.mean(dim=0)
    means = torch.stack([features[of_image == number].mean(dim=0) for number in range(len(classes))])
    rest = features - means[of_image]
    covariance = rest.T @ rest / len(features)
    own = covariance.diagonal().mean().clamp(min=1e-12)
    covariance += SHRINKAGE * own * torch.eye(len(covariance), dtype=torch.float64)
    whiten = torch.linalg.cholesky(torch.linalg.inv(covariance))  # its square is the inverse
    means = (means - centre) @ whiten
    exact = {"centre": centre, "whiten": whiten, "means": means.T, "norms": means.square().sum(dim=1)}
    constants = {name: value.float().contiguous() for name, value in exact.items()}

    # each part in its own standard deviations
    for name, part in parts(early, logits, constants).items():
        constants[f"{name}_mean"] = part.mean()
        constants[f"{name}_scale"] = 1 / part.std(correction=0).clamp(min=1e-6)
    return constants


def parts(early: Tensor, logits: Tensor, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """-> float32 [n] each: the negative distance to the nearest class mean, and the negative log-entropy."""
    features = (early - constants["centre"]) @ constants["whiten"]
    squares = features.square().sum(dim=1, keepdim=True) + constants["norms"]
    nearest = (squares - 2 * (features @ constants["means"])).amin(dim=1)
    log_p = logits.log_softmax(dim=1)
    sureness = -(LEAST_ENTROPY - (log_p.exp() * log_p).sum(dim=1)).log()
    return {"distance": -nearest.clamp(min=0).sqrt(), "sureness": sureness}


def familiarity(early: Tensor, logits: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
    """-> float32 [n]: about 0 is what training images have on average, less is stranger."""
    distance, sureness = (
        (part - constants[f"{name}_mean"]) * constants[f"{name}_scale"]
        for name, part in parts(early, logits, constants).items()
    )
    return (distance + BEYOND).clamp(max=0) + sureness


def threshold(held: np.ndarray, kept: float = KEPT) -> float:
    """-> the largest value that keeps at least `kept` of new images like these, [n], on average: their
    ceil((n + 1) kept)-th largest; the least one where n are too few to say."""
    rank = int(np.ceil(round((len(held) + 1) * kept, 9)))
    return float(np.sort(held)[-min(rank, len(held))])


def calibrated(
    held: np.ndarray, test: np.ndarray, drawn: dict[str, np.ndarray], names: tuple[str, str], note: str
) -> Familiarity:
    """-> a variant's threshold by the familiarity [n] that it gave held-out images, and what it comes to on
    test images, and on drawn pictures, by their kind. names: of the two splits; note: what else the held-out
    images were used for."""
    limit = threshold(held)
    return Familiarity(
        threshold=limit,
        kept=KEPT,
        split=names[0],
        images=len(held),
        note=note,
        test_split=names[1],
        test_kept=float((test >= limit).mean()),
        drawn={
            kind: Separation(auroc(test, values), float((values >= limit).mean()))
            for kind, values in drawn.items()
        },
    )


def auroc(higher: np.ndarray, lower: np.ndarray) -> float:
    """-> the chance that one of `higher` [n] is above one of `lower` [m]; a tie counts half."""
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, higher, "left") + np.searchsorted(ordered, higher, "right")
    return float(below.mean() / (2 * len(lower)))
