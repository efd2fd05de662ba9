"""Image folders that cannot be used are refused in one sentence;
unreadable images are named in one report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.data.datasets import DataSpec, load_data
from ffl_deploy.data.folders import check_file, find_images, own_size
from ffl_deploy.data.splits import Paths, UnreadableImage
from ffl_deploy.errors import UsageError

MakeFolder = Callable[..., Path]


def refuse(folder: Path, memory_limit: int | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        load_data(DataSpec(source=str(folder)), memory_limit)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


def test_missing_folder(tmp_path: Path) -> None:
    assert "there is no such folder" in refuse(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path) -> None:
    assert f"{tmp_path} has no class folders" in refuse(tmp_path)


def test_no_training_set(image_folder: MakeFolder) -> None:
    folder = image_folder()
    shutil.rmtree(folder / "train")
    assert "has no train/" in refuse(folder)


def test_one_part_of_a_folder_is_not_taken_for_all_of_it(image_folder: MakeFolder) -> None:
    folder = image_folder()
    assert f"Did you mean --data {folder}?" in refuse(folder / "train")


def test_train_without_classes(image_folder: MakeFolder) -> None:
    folder = image_folder()
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    assert "has no class folders" in refuse(folder)


def test_class_folder_without_images(image_folder: MakeFolder) -> None:
    folder = image_folder()
    (folder / "train" / "empty").mkdir()
    (folder / "train" / "empty" / "notes.txt").write_text("no image")
    text = refuse(folder)
    assert f"{folder / 'train' / 'empty'} holds no images" in text
    assert "add some or remove the folder" in text


@pytest.mark.parametrize("part", ["train", "test"])
def test_unequal_classes(image_folder: MakeFolder, part: str) -> None:
    folder = image_folder(classes=("cat", "dog", "emu"))
    shutil.rmtree(folder / part / "emu")
    assert f"{folder / 'test'} has {'no ' if part == 'test' else ''}images of emu" in refuse(folder)


def test_one_class(image_folder: MakeFolder) -> None:
    assert "one class only (cat)" in refuse(image_folder(classes=("cat",)))


def test_a_class_with_one_training_image(image_folder: MakeFolder) -> None:
    folder = image_folder()
    for path in sorted((folder / "train" / "cat").iterdir())[1:]:
        path.unlink()
    assert "has one image only of cat" in refuse(folder)


def spoil(folder: Path) -> list[Path]:
    """-> three unreadable images: empty, cut off, not an image; one of them in the test set."""
    empty, cut, text = folder / "train/cat/000.png", folder / "train/dog/001.png", folder / "test/dog/002.png"
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-200])
    text.write_text("no image at all")
    return [empty, cut, text]


@pytest.mark.parametrize("memory_limit", [None, 0], ids=["memory", "disk"])
def test_all_unreadable_images_are_in_one_report(image_folder: MakeFolder, memory_limit: int | None) -> None:
    folder = image_folder()
    spoiled = spoil(folder)
    text = refuse(folder, memory_limit)
    assert text.startswith("3 images cannot be read: ")
    assert all(str(path) in text for path in spoiled)
    assert "empty: the file is empty" in text
    assert "--skip-bad-images" in text


@pytest.mark.parametrize("memory_limit", [None, 0], ids=["memory", "disk"])
def test_skip_bad_images_leaves_out_exactly_those(image_folder: MakeFolder, memory_limit: int | None) -> None:
    folder = image_folder()
    spec = DataSpec(source=str(folder), skip_bad_images=True)
    clean = load_data(spec)
    spoiled = spoil(folder)
    data = load_data(spec, memory_limit)
    assert sorted(data.skipped) == sorted(map(str, spoiled))
    assert len(data.train) + len(data.validation) == 18
    assert data.test.labels.tolist() == [0] * 4 + [1] * 3
    assert np.array_equal(data.test.read(slice(None)), clean.test.read(np.array([0, 1, 2, 3, 4, 5, 7])))


def test_which_images_are_held_out_does_not_depend_on_unreadable_ones(image_folder: MakeFolder) -> None:
    folder = image_folder(train=20)
    spec = DataSpec(source=str(folder), skip_bad_images=True, validation=0.25)
    before = {image.tobytes() for image in load_data(spec).validation.read(slice(None))}
    spoil(folder)
    after = {image.tobytes() for image in load_data(spec).validation.read(slice(None))}
    assert after <= before
    assert len(after) >= 8


def test_a_class_whose_images_are_all_unreadable(image_folder: MakeFolder) -> None:
    folder = image_folder()
    for path in (folder / "test" / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="has no readable image of dog"):
        load_data(DataSpec(source=str(folder), skip_bad_images=True))


def break_pixels(path: Path) -> None:
    """Damage a PNG's compressed pixels; header and end stay as they are."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(bytes(content))


def test_damage_inside_a_streamed_training_image_is_found_when_it_is_read(image_folder: MakeFolder) -> None:
    folder = image_folder(val=2)
    break_pixels(folder / "train/cat/003.png")
    data = load_data(DataSpec(source=str(folder), image_size=128), memory_limit=0)
    with pytest.raises(UnreadableImage, match=r"cat/003.png cannot be read \(.*mend it and go on"):
        data.train.read(slice(None))
    assert data.train.read(np.array([2, 4])).shape == (2, 128, 128, 3)


def test_damage_inside_held_out_images_is_found_before_training(image_folder: MakeFolder) -> None:
    folder = image_folder(val=2)
    for name in ("val/dog/001.png", "test/cat/001.png"):
        break_pixels(folder / name)
    text = refuse(folder, memory_limit=0)
    assert "val/dog/001.png" in text
    assert "test/cat/001.png" in text


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tif"])
def test_check_file_passes_whole_files_and_finds_cut_ones(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    assert check_file(str(path)) is None
    content = path.read_bytes()
    path.write_bytes(content + b"padding of a camera")
    assert check_file(str(path)) is None
    path.write_bytes(content[: len(content) // 2])
    assert check_file(str(path)) is not None
    path.unlink()
    assert check_file(str(path)) == "No such file or directory"


def test_a_jpeg_with_a_long_trailer_is_not_refused(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes() + bytes(20_000))  # no end marker in the last 4 kB: decoding decides
    assert check_file(str(path)) is None


def test_images_are_found_at_any_depth_and_hidden_files_passed_over(image_folder: MakeFolder) -> None:
    folder = image_folder(train=2)
    (folder / "train/cat/deeper").mkdir()
    (folder / "train/cat/000.png").rename(folder / "train/cat/deeper/Ä.PNG")
    (folder / "train/cat/._001.png").write_bytes(b"resource fork")
    (folder / "train/.cache").mkdir()
    listing = find_images(folder / "train")
    assert listing.classes == ("cat", "dog")
    assert [Path(path).name for path in listing.paths] == ["001.png", "Ä.PNG", "000.png", "001.png"]
    assert listing.labels.tolist() == [0, 0, 1, 1]


def test_a_folder_link_that_leads_in_a_circle_ends(image_folder: MakeFolder) -> None:
    folder = image_folder(train=2)
    (folder / "train/cat/again").symlink_to(folder / "train/cat")
    assert len(find_images(folder / "train").labels) == 4


def test_paths_are_kept_as_they_are() -> None:
    names = ["a/1.png", "", "b/\udcff.png", "ß/ü.jpg"]  # also a name that is no UTF-8
    paths = Paths.of("/root", names)
    assert list(paths) == [f"/root/{name}" for name in names]
    assert list(paths.take(np.array([3, 0]))) == ["/root/ß/ü.jpg", "/root/a/1.png"]
    assert list(paths[1:3]) == ["/root/", "/root/b/\udcff.png"]
    assert len(paths.take(np.array([True, False, False, True]))) == 2


def test_imagenets_own_layout_takes_val_as_the_test_set(image_folder: MakeFolder) -> None:
    folder = image_folder(test=4, train=20)
    (folder / "test").rename(folder / "val")
    data = load_data(DataSpec(source=str(folder)))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [36, 4, 8]


def test_no_readable_validation_image(image_folder: MakeFolder) -> None:
    folder = image_folder(train=4, test=2, val=2)
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="no readable image for validation"):
        load_data(DataSpec(source=str(folder), skip_bad_images=True))


def test_a_class_folder_whose_name_is_not_utf8(image_folder: MakeFolder) -> None:
    folder = image_folder()
    for part in ("train", "test"):
        os.rename(folder / part / "cat", os.fsencode(folder / part) + b"/r\xff")
    assert "class folder whose name is not UTF-8" in refuse(folder)


def test_a_file_that_breaks_pillow_is_reported_as_unreadable(
    image_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plugins raise what they like, also while the size of the images is looked up."""
    folder = image_folder()
    original = Image.open

    def damaged(file: object, *arguments: object, **options: object) -> Image.Image:
        if str(file).endswith("cat/000.png"):
            raise RuntimeError("Failed to decode image")
        return original(file, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", damaged)
    assert own_size([str(folder / "train" / "cat" / f"00{number}.png") for number in range(3)]) == 16


@pytest.mark.parametrize("how", ["no-folder", "empty-folder"])
def test_a_class_may_lack_validation_images(image_folder: MakeFolder, how: str) -> None:
    """Rare classes have few images; which number a class has does not depend on who has some."""
    folder = image_folder(classes=("ant", "bee", "cat"), val=2)
    shutil.rmtree(folder / "val" / "bee")
    if how == "empty-folder":
        (folder / "val" / "bee").mkdir()
    data = load_data(DataSpec(source=str(folder)))
    assert data.classes == ("ant", "bee", "cat")
    assert data.validation.labels.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("how", ["no-folder", "empty-folder"])
def test_a_class_without_test_images_has_three_ways_out(image_folder: MakeFolder, how: str) -> None:
    folder = image_folder(classes=("ant", "bee", "cat"))
    shutil.rmtree(folder / "test" / "bee")
    if how == "empty-folder":
        (folder / "test" / "bee").mkdir()
    text = refuse(folder)
    assert f"{folder / 'test'} has no images of bee" in text
    assert "move some of the training images there, leave the class out of both, or take" in text
    (folder / "test").rename(folder.parent / "away")  # as it advises
    assert load_data(DataSpec(source=str(folder))).split_here


def test_names_that_differ_in_their_accents_alone(image_folder: MakeFolder) -> None:
    folder = image_folder(classes=("cafe\u0301", "tea"))
    (folder / "test" / "cafe\u0301").rename(folder / "test" / "caf\xe9")
    assert "with its accents written otherwise (NFC or NFD): rename one" in refuse(folder)
