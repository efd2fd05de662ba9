"""Accuracy counted over processes, some of which may have nothing to count."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from train.distributed import World
from train.evaluate import accuracies, predictions
from train.machine import Place

NAMES = ["fused", "ensemble", "branch0", "branch1"]


class NoBatches:
    """A process whose share of a small split is empty."""

    def evaluation(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())


class Last(World):
    """The last of four processes; the others had 3 images, of which 2, 1, 0, 3 were right."""

    def sum(self, values: Tensor) -> Tensor:
        return values + (
            torch.tensor([3, 2, 1, 0, 3])
            if values.ndim == 1 and len(values) == 5
            else torch.tensor([7, 8, 9])
        )


def test_a_process_without_images_takes_part() -> None:
    network = MutualNetwork(NetworkConfig(branches=("resnet8", "resnet8"), classes=3, height=8, width=8))
    place = Place(torch.device("cpu"), "fp32", Last(3, 4, 3))
    found = accuracies(network, NoBatches(), "validation", place)  # type: ignore[arg-type]
    assert found == {"fused": 2 / 3, "ensemble": 1 / 3, "branch0": 0.0, "branch1": 1.0}
    predicted = predictions(network, NoBatches(), "test", 3, place)  # type: ignore[arg-type]
    assert list(predicted) == NAMES
    np.testing.assert_array_equal(predicted["fused"], [7, 8, 9])
