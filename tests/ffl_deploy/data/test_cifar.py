"""CIFAR's own files: read as torchvision wrote them; damaged, missing and offline in one sentence each."""

from __future__ import annotations

import hashlib
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from ffl_deploy.data.datasets import CIFAR_STATISTICS, ArraySplit, DataSpec, load_data
from ffl_deploy.errors import UsageError

torchvision = pytest.importorskip("torchvision")


@pytest.fixture
def tiny_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    """CIFAR-100's files with 40 + 20 images of two classes, their hashes registered; -> (root,
    part -> images NHWC)."""
    kind = torchvision.datasets.CIFAR100
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    images: dict[str, np.ndarray] = {}

    def write(name: str, content: dict[str, object]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for part, count in (("train", 40), ("test", 20)):
        images[part] = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        planes = images[part].transpose(0, 3, 1, 2).reshape(count, -1)
        md5 = write(part, {"data": planes, "fine_labels": [k % 2 for k in range(count)]})
        monkeypatch.setattr(kind, f"{part}_list", [[part, md5]])
    md5 = write("meta", {"fine_label_names": ["apple", "bear"]})
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5})
    return tmp_path, images


def test_pixels_labels_and_classes(tiny_cifar100: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, images = tiny_cifar100
    data = load_data(DataSpec(source="cifar100", root=str(root)))
    assert data.classes == ("apple", "bear")
    assert isinstance(data.test, ArraySplit)
    assert np.array_equal(data.test.images, images["test"])
    assert data.test.labels.tolist() == [0, 1] * 10
    assert (len(data.train), len(data.validation)) == (36, 4)
    assert (data.mean, data.std) == CIFAR_STATISTICS
    together = {image.tobytes() for part in (data.train, data.validation) for image in part.read(slice(None))}
    assert together == {image.tobytes() for image in images["train"]}


def test_damaged_files_are_named(tiny_cifar100: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, _ = tiny_cifar100
    path = root / "cifar-100-python" / "test"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match="cifar-100-python is incomplete or damaged"):
        load_data(DataSpec(source="cifar100", root=str(root)))


def refuse(root: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_data(DataSpec(source="cifar10", root=str(root)))
    assert not any(root.iterdir())
    return str(caught.value)


def test_offline_says_where_the_files_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    text = refuse(tmp_path)
    assert "cannot be downloaded (Name or service not known)" in text
    assert str(tmp_path / "cifar-10-batches-py") in text
    assert "--data-root" in text


def test_a_network_that_never_answers_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_is_over = threading.Event()
    monkeypatch.setattr("urllib.request.urlopen", lambda *arguments, **options: test_is_over.wait(200))
    monkeypatch.setattr("ffl_deploy.downloads.PATIENCE", 0.2)
    try:
        assert "no answer within" in refuse(tmp_path)
    finally:
        test_is_over.set()
