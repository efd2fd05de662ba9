"""A folder of CLASS/* alone: split by what is in the files, equal pictures together, always the same way."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.data.datasets import DataSpec, ImageData, load_data
from ffl_deploy.data.flat import divide
from ffl_deploy.data.folders import Cut
from ffl_deploy.errors import UsageError

CUT = Cut(0.1, 0)


def photographs(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"IMG_{seed}{number:03d}.png")
    return folder


def pictures(data: ImageData) -> dict[str, set[bytes]]:
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        name: {split.prepared(row).tobytes() for row in range(len(split))} for name, split in parts.items()
    }


def load(folder: Path, **options: object) -> ImageData:
    limit = options.pop("memory_limit", None)
    return load_data(DataSpec(source=str(folder), **options), limit)  # type: ignore[arg-type]


def test_a_fifth_is_the_test_set_and_a_tenth_of_the_rest_validates(tmp_path: Path) -> None:
    data = load(photographs(tmp_path / "photos", {"cat": 50, "dog": 30, "emu": 3}))
    assert data.split_here
    assert data.classes == ("cat", "dog", "emu")
    counts = {name: np.bincount(part.labels).tolist() for name, part in vars(data).items() if name in
              ("train", "validation", "test")}  # fmt: skip
    assert counts == {"train": [36, 22, 1], "validation": [4, 2, 1], "test": [10, 6, 1]}
    found = pictures(data)
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert not found["validation"] & found["test"]


@pytest.mark.parametrize("memory_limit", [None, 0], ids=["memory", "disk"])
def test_names_and_places_do_not_change_the_split(tmp_path: Path, memory_limit: int | None) -> None:
    first = photographs(tmp_path / "photos", {"cat": 20, "dog": 20})
    again = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(first, again)
    for number, path in enumerate(sorted(again.rglob("*.png"), reverse=True)):
        path.rename(path.with_name(f"{number}.png"))
    assert pictures(load(first)) == pictures(load(again, memory_limit=memory_limit))
    assert pictures(load(first, split_seed=1))["test"] != pictures(load(first))["test"]


def test_adding_photographs_moves_few_of_those_that_were_there(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", {"cat": 60, "dog": 60})
    before = pictures(load(folder))
    photographs(folder, {"cat": 10, "dog": 10}, seed=1)
    after = pictures(load(folder))
    moved = len(before["test"] - after["test"])
    assert moved <= 4
    assert len(after["test"]) == 28


@pytest.mark.parametrize("memory_limit", [None, 0], ids=["memory", "disk"])
def test_the_same_picture_is_never_in_two_parts(tmp_path: Path, memory_limit: int | None) -> None:
    """Copied under other names, saved as another format, and once in another class."""
    folder = photographs(tmp_path / "photos", {"cat": 30, "dog": 30})
    for number, path in enumerate(sorted((folder / "cat").iterdir())[:20]):
        shutil.copy(path, folder / "cat" / f"copy {number}.png")
        Image.open(path).save(folder / "cat" / f"as {number}.bmp")
    shutil.copy(folder / "cat" / "IMG_0003.png", folder / "dog" / "also a cat.png")
    data = load(folder, memory_limit=memory_limit)
    found = pictures(data)
    assert len(data.train) + len(data.validation) + len(data.test) == 101
    assert sum(map(len, found.values())) == 60  # each picture in one part
    assert 10 <= (data.test.labels == 0).sum() <= 16  # a fifth of 70, as far as groups of three allow


def test_unreadable_photographs_are_reported_or_left_out(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", {"cat": 10, "dog": 10})
    (folder / "cat" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UsageError, match="1 image cannot be read"):
        load(folder)
    for limit in (None, 0):
        data = load(folder, skip_bad_images=True, memory_limit=limit)
        assert list(data.skipped) == [str(folder / "cat" / "broken.jpg")]
        assert len(data.train) + len(data.validation) + len(data.test) == 20


def test_too_few_pictures_of_a_class(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", {"cat": 9, "dog": 2})
    with pytest.raises(UsageError, match="fewer than three different pictures of dog"):
        load(folder)
    for number in range(5):
        shutil.copy(folder / "dog" / "IMG_0000.png", folder / "dog" / f"{number}.png")
    with pytest.raises(UsageError, match="fewer than three different pictures of dog"):
        load(folder)


@pytest.mark.parametrize("beside", ["validation nowhere", "a class called train"])
def test_what_else_is_such_a_folder(tmp_path: Path, beside: str) -> None:
    if beside == "a class called train":
        data = load(photographs(tmp_path / "vehicles", {"train": 10, "bus": 10}))
        assert data.classes == ("bus", "train")
    else:
        photographs(tmp_path / "photos" / "train", {"cat": 10, "dog": 10})
        data = load(tmp_path / "photos")
        assert (data.classes, data.name, len(data.test)) == (("cat", "dog"), "photos", 4)


@pytest.mark.parametrize("seed", range(20))
def test_any_groups_give_each_class_all_three_parts(seed: int) -> None:
    """Random sizes of groups of equal pictures: whole groups, no image lost, none of the parts empty."""
    generator = np.random.default_rng(seed)
    sizes = generator.choice([1, 1, 1, 2, 9], int(generator.integers(3, 40)))
    keys = np.repeat(generator.permutation(len(sizes)).astype(np.uint64), sizes)
    prints = generator.integers(1, 2**63, len(keys), dtype=np.uint64)
    rows = divide(np.zeros(len(keys), np.int64), prints, keys, CUT)
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(len(keys)))
    assert all(len(part) for part in rows.values())
    parts = [set(keys[part].tolist()) for part in rows.values()]
    assert sum(map(len, parts)) == len(sizes)
    assert len(rows["test"]) <= max(0.2 * len(keys), 1) + sizes.max()


def test_guidance_is_typed_and_chance_is_named(tmp_path: Path) -> None:
    from train.flags import configure
    from train.guidance import advice, no_better_than_chance

    folder = tmp_path / "photos"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(number + ord(name[0])).integers(
                0, 256, (300, 400, 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")
    config = configure({"data.source": str(folder)})
    lines = advice(config, load(folder))
    assert "a fifth of each class was held out" in lines[0]
    assert lines[1].endswith(
        f"ffl-train --data {folder} --branches torchvision:resnet18,torchvision:resnet18 --pretrained "
        "--image-size 128"
    )
    pretrained = configure({"data.source": str(folder), "model.pretrained": True})
    assert "read at 64x64" in advice(pretrained, load(folder))[1]
    assert "--image-size 128" in advice(pretrained, load(folder))[1]
    assert advice(configure({}), load_data(DataSpec())) == []

    labels = np.repeat(np.arange(4), 30)
    assert no_better_than_chance({"fused": 0.25, "branch0": 0.28}, labels, 4).startswith(
        "25 % is chance for 4 "
    )
    assert no_better_than_chance({"fused": 0.25, "branch0": 0.60}, labels, 4) == ""


def test_a_phone_s_photographs_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ffl_deploy.images import PHONE_FORMATS
    from train import guidance

    monkeypatch.setattr(guidance, "UNREADABLE", PHONE_FORMATS)
    lines = guidance._formats({"called .heic": 4, "called .hif": 1, "called .txt": 2})
    assert len(lines) == 1
    assert lines[0].startswith("5 of these are HEIF photographs, which can be read; run: ")
    assert lines[0].endswith("[heif]'")
