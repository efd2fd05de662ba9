"""What travels beside the golden samples (the samples themselves: test_export.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.cascade import FEWEST, SURE
from export.golden import determined, golden_rows
from ffl_deploy.parity import PARITY_GATES
from ffl_deploy.preprocessing import Preprocessing
from ffl_deploy.probes import Probes, draw, prepared
from ffl_deploy.selfcheck import judged

SIZE = Preprocessing(16, 16)


class Means(nn.Module):
    """Mean colours as logits; those of pictures as varied as noise pass through a sum that fp32 rounds to
    1/16."""

    def __init__(self, rough: bool) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.tensor(1e6 if rough else 0.0))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pixels = images.to(self.large.dtype).flatten(1, 2) / 255
        lost = torch.where(pixels.std(dim=(1, 2)) > 0.27, self.large, 0.0)[:, None]
        return ((pixels.mean(dim=1) + lost) - lost,)


class WithFp32(Means):
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (super().forward(images)[0] @ torch.eye(3),)


def probes_of(model: nn.Module) -> Probes:
    files = draw(SIZE)
    pixels = prepared(files, SIZE)
    with torch.inference_mode():
        return Probes(files, pixels, model(torch.from_numpy(pixels))[0].numpy())


def test_pictures_whose_logits_rounding_decides_are_not_asked_about() -> None:
    model = Means(rough=True)
    probes = probes_of(model)
    kept = determined(probes, model, scale=0.1)
    assert np.isnan(kept.logits).all(axis=1).tolist() == [False, False, True, True]
    assert (kept.logits[:2] == probes.logits[:2]).all()
    assert (kept.pixels == probes.pixels).all(), "their pixels still are"

    golden = np.zeros((5, 16, 16, 3), np.uint8), np.zeros((5, 3), np.float32)
    images, logits = judged(*golden, kept, PARITY_GATES["fp32"])
    assert (len(images), len(logits)) == (7, 7)
    assert (images[5:] == probes.pixels[:2]).all()
    assert np.isfinite(logits).all()


def test_what_the_run_stored_is_not_excused() -> None:
    """Only the network's own rounding is: logits of another network stay, and break the gate."""
    model = Means(rough=False)
    other = probes_of(model)._replace(logits=np.full((4, 3), 7, np.float32))
    assert (determined(other, model, scale=0.1).logits == 7).all()


@pytest.mark.parametrize("kind", [Means, WithFp32], ids=["any", "one with fp32 written into it"])
def test_a_network_s_pictures_all_stay(kind: Any) -> None:
    model = kind(rough=False)
    probes = probes_of(model)
    assert (determined(probes, model, scale=0.1).logits == probes.logits).all()


LABELS = np.arange(200) % 10


def margins_of(deferred: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """-> [200]: the first ones deferred, the others answered by the first exit, each so far from the other;
    whatever is not given lies at the threshold."""
    margins = np.where(np.arange(200) < 100, -1e-3, 1e-3)
    margins[: len(deferred)] = -deferred
    margins[100 : 100 + len(answered)] = answered
    return margins


def test_samples_of_a_cascade_leave_by_both_exits_far_from_the_threshold() -> None:
    margins = margins_of(np.linspace(0.1, 3, 100), np.linspace(0.1, 3, 100))
    rows = golden_rows(LABELS, 64, margins)
    assert ((margins[rows] < 0).sum(), len(rows)) == (32, 64)
    assert np.abs(margins[rows]).min() > SURE
    for side in (rows[rows < 100], rows[rows >= 100]):
        assert np.bincount(LABELS[side], minlength=10).min() >= 2, "of each class"
    assert golden_rows(LABELS, 1, margins).shape == (1,)


def test_what_one_exit_lacks_the_other_one_gives() -> None:
    rows = golden_rows(LABELS, 64, margins_of(np.full(20, 2.0), np.full(100, 2.0)))
    assert (rows < 100).sum() == 20
    assert len(rows) == 64
    rows = golden_rows(LABELS, 64, np.full(200, 2.0))
    assert len(rows) == 64, "nothing is deferred"


def test_where_few_are_far_from_the_threshold_the_farthest_stand_in() -> None:
    """Else a bundle would be verified by next to nothing, or by images that rounding sends anywhere."""
    deferred = np.array([2.0, 0.4, 0.3, 0.9, *np.linspace(0.05, 0.1, 20)])
    rows = golden_rows(LABELS, 64, margins_of(deferred, np.full(100, 2.0)))
    chosen = rows[rows < 100]
    assert set(chosen) == set(np.argsort(-deferred)[:FEWEST])
    assert len(rows) == 64
