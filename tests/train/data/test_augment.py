"""Training views against a naive reference that handles one image at a time."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from train.config import DataOptions
from train.data.augment import (
    POLICIES,
    RandomCrops,
    crop_one,
    draw_crops,
    mix,
    random_changes,
    soften,
    transform_one,
)
from train.randomness import generator


def naive_crop(image: np.ndarray, padding: int, top: int, left: int, mirrored: bool) -> np.ndarray:
    """[h, w, 3] by index arithmetic: reflection without repeating the border pixel."""

    def reflected(position: int, length: int) -> int:
        position = abs(position)
        return position if position < length else 2 * (length - 1) - position

    height, width = image.shape[:2]
    out = np.empty_like(image)
    for y in range(height):
        for x in range(width):
            column = width - 1 - x if mirrored else x
            out[y, x] = image[reflected(y + top - padding, height), reflected(column + left - padding, width)]
    return out


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (1, False), (2, True), (4, True)])
def test_random_crops_equal_the_naive_reference_bit_for_bit(padding: int, flip: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 7, 9, 3), dtype=np.uint8)
    indices = torch.tensor([5, 0, 0, 3, 1, 2, 4, 4, 4, 1])
    crops = RandomCrops(torch.from_numpy(images).permute(0, 3, 1, 2), padding, flip)
    drawn = draw_crops(10, padding, flip, generator(0, "augment", 3))
    batch = crops(torch.stack([indices, *(values.long() for values in drawn)])).permute(0, 2, 3, 1).numpy()
    top, left, mirrored = (
        values.tolist() for values in draw_crops(10, padding, flip, generator(0, "augment", 3))
    )
    for place, row in enumerate(indices.tolist()):
        expected = naive_crop(images[row], padding, top[place], left[place], mirrored[place])
        assert np.array_equal(batch[place], expected)
        assert np.array_equal(
            crop_one(images[row], padding, top[place], left[place], mirrored[place]), expected
        )


def test_draws_reach_every_cut_and_mirror_half() -> None:
    top, left, mirrored = draw_crops(4000, 2, True, generator(1, "augment", 0))
    assert set(top.tolist()) == set(left.tolist()) == {0, 1, 2, 3, 4}
    assert 0.45 < mirrored.float().mean() < 0.55
    assert not draw_crops(100, 2, False, generator(1, "augment", 0)).mirrored.any()


def test_draws_are_the_same_with_and_without_mirroring() -> None:
    with_flip, without = (draw_crops(50, 4, flip, generator(1, "augment", 0)) for flip in (True, False))
    assert torch.equal(with_flip.top, without.top)
    assert torch.equal(with_flip.left, without.left)


MEAN = (120.4, 99.6, 80.0)


def picture(seed: int = 0) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    image.setflags(write=False)  # as the images of a split in memory may be
    return image


@pytest.mark.parametrize(
    ("name", "policy"),
    [("randaugment", v2.RandAugment), ("trivialaugment", v2.TrivialAugmentWide)],
    ids=["randaugment", "trivialaugment"],
)
def test_random_changes_are_torchvisions_and_of_their_seed_alone(name: Any, policy: Any) -> None:
    changes = random_changes(DataOptions(auto_augment=name), MEAN)
    assert changes is not None
    own = policy(interpolation=v2.InterpolationMode.BILINEAR, fill=[120.0, 100.0, 80.0])
    seen, state = set(), torch.get_rng_state()
    for seed in range(8):
        found = transform_one(picture(), changes, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wanted = own(torch.from_numpy(picture().copy()).permute(2, 0, 1))
        assert np.array_equal(found, wanted.permute(1, 2, 0).numpy())
        assert (found.dtype, found.shape) == (np.uint8, (24, 20, 3))
        seen.add(found.tobytes())
    assert len(seen) > 4
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_erased_is_the_mean_color() -> None:
    always, never = (random_changes(DataOptions(random_erase=share), MEAN) for share in (1.0, 0.0))
    assert always is not None
    assert never is None
    before = picture()
    changed = transform_one(before, always, 3)
    other = (changed != before).any(axis=2)
    assert 0.01 < other.mean() < 0.4  # torchvision erases 2 to 33 %
    assert (changed[other] == (120, 100, 80)).all()
    share = [
        bool((transform_one(before, random_changes(DataOptions(random_erase=0.3), MEAN), s) != before).any())  # type: ignore[arg-type]
        for s in range(400)
    ]
    assert 0.2 < np.mean(share) < 0.4


def test_every_policy_that_can_be_asked_for_is_there() -> None:
    assert get_args(get_type_hints(DataOptions)["auto_augment"]) == ("none", *POLICIES)


def test_soft_labels() -> None:
    soft = soften(torch.tensor([2, 0]), classes=4, smoothing=0.2)
    expected = torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    torch.testing.assert_close(soft, expected)


@pytest.mark.parametrize(
    "options", [DataOptions(mixup=0.4), DataOptions(cutmix=1.0), DataOptions(mixup=0.4, cutmix=1.0)]
)
def test_mixing_conserves_the_mass_of_targets(options: DataOptions) -> None:
    targets = soften(torch.arange(12) % 5, 5, 0.1)
    for seed in range(20):
        _, mixed = mix(torch.rand(12, 3, 8, 8), targets, options, generator(seed, "mix", 0))
        torch.testing.assert_close(mixed.sum(dim=1), torch.ones(12))
        torch.testing.assert_close(mixed.sum(dim=0), targets.sum(dim=0))  # only the partners change


def test_cutmix_targets_carry_the_share_that_was_really_pasted() -> None:
    # Image k is filled with k and labelled k, so that pixels tell whose they are.
    images = torch.arange(16.0).view(16, 1, 1, 1).expand(16, 3, 10, 6).contiguous()
    targets = torch.eye(16)
    shares = set()
    for seed in range(40):
        mixed, soft = mix(images, targets, DataOptions(cutmix=1.0), generator(seed, "mix", 0))
        for k in range(16):
            counts = torch.bincount(mixed[k, 0].flatten().long(), minlength=16) / 60
            torch.testing.assert_close(soft[k], counts, atol=1e-6, rtol=0)
        shares.add(round(float(soft[0, 0]), 3))
    assert len(shares) > 10


def test_mixup_mixes_pixels_as_it_mixes_targets() -> None:
    images = torch.eye(8).view(8, 1, 8, 1).expand(8, 3, 8, 4).contiguous()  # row k of image k is 1
    mixed, soft = mix(images, torch.eye(8), DataOptions(mixup=1.0), generator(3, "mix", 0))
    torch.testing.assert_close(mixed[:, 0, :, 0], soft)
    assert 0 < float(soft[soft > 0].min()) < 1


def test_with_both_each_batch_takes_one_of_them() -> None:
    images = torch.eye(8).view(8, 1, 8, 1).expand(8, 3, 8, 8).contiguous()
    kinds = set()
    for seed in range(20):
        mixed, _ = mix(images, torch.eye(8), DataOptions(mixup=1.0, cutmix=1.0), generator(seed, "mix", 0))
        kinds.add("cutmix" if set(mixed.unique().tolist()) <= {0.0, 1.0} else "mixup")
    assert kinds == {"mixup", "cutmix"}
