"""What travels beside the golden samples (the samples themselves: test_export.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.golden import determined
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
