"""Splits held apart, and the statistics that training normalises by."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ffl_deploy.data.datasets import (
    CIFAR_STATISTICS,
    IMAGENET_STATISTICS,
    ArraySplit,
    DataSpec,
    FileSplit,
    channel_statistics,
    folder_statistics,
    load_data,
    stratified,
)
from ffl_deploy.errors import UsageError
from ffl_deploy.images import load
from ffl_deploy.preprocessing import Preprocessing


def test_held_out_images_are_class_balanced_and_disjoint() -> None:
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [100, 50, 7]))
    kept, held_out = stratified(labels, share=0.1, seed=3)
    assert np.bincount(labels[held_out]).tolist() == [10, 5, 1]
    assert sorted([*kept, *held_out]) == list(range(157))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held_out) > 0).all()


def test_the_cut_depends_on_its_seed_alone() -> None:
    labels = np.repeat(np.arange(5), 40)
    first, again, other = (stratified(labels, 0.25, seed)[1] for seed in (0, 0, 1))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_at_least_one_image_of_each_class_stays_on_either_side() -> None:
    kept, held_out = stratified(np.array([0, 0, 1, 1]), share=0.9, seed=0)
    assert len(kept) == len(held_out) == 2
    kept, held_out = stratified(np.array([0, 0, 1, 1]), share=0.001, seed=0)
    assert len(kept) == len(held_out) == 2


def test_a_class_with_one_image_is_refused() -> None:
    with pytest.raises(UsageError, match="every class needs at least 2 training images"):
        stratified(np.array([0, 0, 1]), share=0.1, seed=0)


def test_channel_statistics_are_those_of_numpy_in_float64() -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 9, 7, 3), dtype=np.uint8)
    images[..., 1] //= 3
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, images.astype(np.float64).mean(axis=(0, 1, 2)), atol=5.1e-5)
    np.testing.assert_allclose(std, images.astype(np.float64).std(axis=(0, 1, 2)), atol=5.1e-5)


def test_a_constant_channel_gets_deviation_1() -> None:
    assert channel_statistics(np.full((2, 3, 3, 3), 7, np.uint8)) == ((7.0, 7.0, 7.0), (1.0, 1.0, 1.0))


def test_digits_are_1797_images_in_three_splits() -> None:
    data = load_data(DataSpec())
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1295, 143, 359]
    assert data.classes == tuple("0123456789")
    images = np.concatenate([part.read(slice(None)) for part in (data.train, data.validation, data.test)])
    assert images.shape == (1797, 8, 8, 3)
    assert images.max() == 255  # 16 levels of gray, spread to 0..255
    # All digits are different images, so a shared one would show here.
    assert len(np.unique(images.reshape(1797, -1), axis=0)) == 1797
    assert np.bincount(data.test.labels).min() >= 35
    np.testing.assert_allclose(
        data.mean, data.train.read(slice(None)).mean(axis=(0, 1, 2), dtype=np.float64), atol=1e-4
    )


def test_digits_at_another_size_are_resized_once() -> None:
    data = load_data(DataSpec(image_size=12))
    assert data.train.read(slice(0, 2)).shape == (2, 12, 12, 3)
    assert data.preprocessing == Preprocessing(12, 12)


def test_the_test_set_does_not_depend_on_how_validation_is_cut() -> None:
    one, other = (
        load_data(DataSpec(validation=share, split_seed=seed)) for share, seed in ((0.1, 0), (0.3, 5))
    )
    assert np.array_equal(one.test.read(slice(None)), other.test.read(slice(None)))
    assert len(other.validation) > len(one.validation)


@pytest.mark.parametrize("memory_limit", [None, 0], ids=["memory", "disk"])
def test_splits_give_the_evaluation_view_of_their_files(
    image_folder: Callable[..., Path], memory_limit: int | None
) -> None:
    folder = image_folder(size=(30, 22), val=3)
    data = load_data(DataSpec(source=str(folder)), memory_limit)
    assert isinstance(data.train, FileSplit if memory_limit == 0 else ArraySplit)
    assert data.preprocessing == Preprocessing(16, 16, resize="crop")  # 22 pixels, down to a multiple of 8
    # val/ is there: nothing is cut
    assert [len(part) for part in (data.train, data.validation, data.test)] == [20, 6, 8]
    for part, name, count in ((data.train, "train", 10), (data.validation, "val", 3), (data.test, "test", 4)):
        paths = [folder / name / label / f"{k:03d}.png" for label in ("cat", "dog") for k in range(count)]
        expected = np.stack([load(path, data.preprocessing) for path in paths])
        assert np.array_equal(part.read(slice(None)), expected)
        assert part.labels.tolist() == [0] * count + [1] * count
        assert np.array_equal(part.read(np.array([3, 0])), expected[[3, 0]])
        assert np.array_equal(part.prepared(1), expected[1])


def test_memory_decides_neither_splits_nor_statistics(image_folder: Callable[..., Path]) -> None:
    spec = DataSpec(source=str(image_folder(train=30)), validation=0.2)
    held, streamed = load_data(spec), load_data(spec, memory_limit=0)
    assert isinstance(held.train, ArraySplit)
    assert isinstance(streamed.train, FileSplit)
    assert (held.mean, held.std) == (streamed.mean, streamed.std)
    for name in ("train", "validation", "test"):
        one, other = getattr(held, name), getattr(streamed, name)
        assert np.array_equal(one.read(slice(None)), other.read(slice(None)))
        assert np.array_equal(one.labels, other.labels)
    assert np.bincount(held.validation.labels).tolist() == [6, 6]


def test_the_limit_counts_the_decoded_images_of_all_splits(image_folder: Callable[..., Path]) -> None:
    spec = DataSpec(source=str(image_folder()))
    exact = (2 * 10 + 2 * 4) * 16 * 16 * 3
    assert isinstance(load_data(spec, exact).train, ArraySplit)
    assert isinstance(load_data(spec, exact - 1).train, FileSplit)


def test_a_streamed_split_shows_its_original_images(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(size=(30, 22), val=2)
    data = load_data(DataSpec(source=str(folder)), memory_limit=0)
    assert np.array_equal(data.train.original(10), load(folder / "train" / "dog" / "000.png"))
    assert data.train.original(10).shape == (22, 30, 3)


def test_statistics_of_small_images_are_measured_and_of_large_ones_imagenets(
    image_folder: Callable[..., Path],
) -> None:
    folder = image_folder(val=2)
    small = load_data(DataSpec(source=str(folder)), memory_limit=0)
    expected = small.train.read(slice(None)).astype(np.float64)
    np.testing.assert_allclose(small.mean, expected.mean(axis=(0, 1, 2)), atol=1e-4)
    large = load_data(DataSpec(source=str(folder), image_size=128))
    assert (large.mean, large.std) == IMAGENET_STATISTICS


def test_statistics_are_sampled_evenly_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.repeat(np.arange(100, dtype=np.uint8), 16 * 3).reshape(100, 4, 4, 3)
    monkeypatch.setattr("ffl_deploy.data.datasets.STATISTICS_SAMPLE", 3)
    mean, _ = folder_statistics(ArraySplit(images, np.zeros(100, np.int64)), Preprocessing(4, 4), False)
    assert mean[0] == pytest.approx((0 + 50 + 99) / 3, abs=1e-4)


@pytest.mark.cifar
def test_cifar100_as_an_image_folder_has_the_official_statistics() -> None:
    folder = os.environ.get("FFL_CIFAR100")
    if not folder:
        pytest.skip("set FFL_CIFAR100 to a folder with CIFAR-100's train/CLASS/* and test/CLASS/*")
    data = load_data(DataSpec(source=folder), memory_limit=0)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [45_000, 5_000, 10_000]
    assert len(data.classes) == 100
    assert data.preprocessing == Preprocessing(32, 32, resize="crop")
    assert np.bincount(data.validation.labels).tolist() == [50] * 100
    np.testing.assert_allclose(data.mean, CIFAR_STATISTICS[0], atol=0.5)
    np.testing.assert_allclose(data.std, CIFAR_STATISTICS[1], atol=0.5)


def test_the_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    from ffl_deploy.arrays import read_arrays
    from ffl_deploy.data import datasets

    stored, digits = read_arrays(Path(datasets.__file__).with_name("digits.npz")), load_digits()
    np.testing.assert_array_equal(stored["images"], digits.images)
    np.testing.assert_array_equal(stored["labels"], digits.target)
