"""A list of images with labels gives the data that a folder of the same images gives; what is wrong with one
is said by its rows."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ffl_deploy.data.datasets import DataSpec, ImageData, load_data
from ffl_deploy.data.inputs import changes
from ffl_deploy.errors import UsageError

Rows = list[dict[str, str]]


def rows_of(folder: Path, parts: Iterable[str] = ("train", "val", "test")) -> Rows:
    """-> a row for each image of a folder, paths relative to it, last ones first."""
    files = sorted(path for part in parts for path in (folder / part).glob("*/*"))
    return [
        {
            "path": str(path.relative_to(folder)),
            "label": path.parent.name,
            "split": path.parent.parent.name,
        }
        for path in reversed(files)
    ]


def write_csv(path: Path, rows: Sequence[dict[str, str]], delimiter: str = ",") -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def read(source: Path, **options: object) -> ImageData:
    return load_data(DataSpec(source=str(source), **options))  # type: ignore[arg-type]


def refuse(source: Path, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        read(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FORMATS: dict[str, Callable[[Path, Rows], Path]] = {
    "csv": lambda folder, rows: write_csv(folder / "list.csv", rows),
    "semicolons": lambda folder, rows: write_csv(folder / "list.csv", rows, ";"),
    "tsv": lambda folder, rows: write_csv(folder / "list.tsv", rows, "\t"),
    "parquet": lambda folder, rows: write_parquet(folder / "list.parquet", rows),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_list_gives_what_the_folder_gives(image_folder: Callable[..., Path], form: str) -> None:
    """Pixels, labels, order and statistics, whatever the order of its rows."""
    folder = image_folder(classes=("cat", "dog", "emu"), val=3)
    listed = read(FORMATS[form](folder, rows_of(folder)))
    plain = read(folder)
    assert (listed.classes, listed.mean, listed.std) == (plain.classes, plain.mean, plain.std)
    assert listed.preprocessing == plain.preprocessing
    for one, other in ((listed.train, plain.train), (listed.test, plain.test)):
        np.testing.assert_array_equal(one.read(slice(None)), other.read(slice(None)))
        np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(listed.validation.labels, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert listed.name == "list"
    assert not listed.split_here


def test_one_part_that_is_held_out_is_the_test_set(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(val=3, test=0)
    data = read(write_csv(folder / "list.csv", rows_of(folder, ("train", "val"))))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [18, 2, 6]


def test_without_parts_it_is_split_by_content_as_a_flat_folder(image_folder: Callable[..., Path]) -> None:
    folder = image_folder()
    rows = [{"path": row["path"], "label": row["label"]} for row in rows_of(folder, ("train",))]
    listed = read(write_csv(folder / "list.csv", rows))
    flat = read_flat_alone(folder)
    assert listed.split_here
    for one, other in ((listed.train, flat.train), (listed.test, flat.test)):
        assert {image.tobytes() for image in one.read(slice(None))} == {
            image.tobytes() for image in other.read(slice(None))
        }


def read_flat_alone(folder: Path) -> ImageData:
    alone = folder.with_name("alone")
    (folder / "train").rename(alone)
    try:
        return read(alone)
    finally:
        alone.rename(folder / "train")


def test_columns_and_place_of_ones_own(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder()
    rows = [{"id": row["path"], "kind": row["label"], "split": row["split"]} for row in rows_of(folder)]
    table = write_csv(tmp_path / "elsewhere.csv", rows)
    text = refuse(table)
    assert "say with --column which of its columns names the image files: id, kind, split" in text
    assert "say with --label-column which of its columns holds the classes" in refuse(table, column="id")
    assert "has no column 'path'; give --column one of: id, kind, split" in refuse(table, column="path")
    assert "has no column 'label'; give --label-column one of" in refuse(table, label_column="label")
    named = {"column": "id", "label_column": "kind"}
    assert "none of its files is in" in (text := refuse(table, **named))
    assert "--data-root" in text
    assert read(table, root=str(folder), **named).classes == ("cat", "dog")


def test_whole_numbers_are_classes_in_their_order(image_folder: Callable[..., Path]) -> None:
    names = tuple(str(number) for number in range(11))
    folder = image_folder(classes=names, train=3, test=1)
    assert read(write_csv(folder / "list.csv", rows_of(folder))).classes == names  # and "10" behind "9"


def test_files_that_are_missing_are_named_or_left_out(image_folder: Callable[..., Path]) -> None:
    folder = image_folder()
    table = write_csv(folder / "list.csv", rows_of(folder))
    gone = [folder / "train" / "cat" / "000.png", folder / "train" / "dog" / "004.png"]
    for path in gone:
        path.unlink()
    text = refuse(table)
    assert "2 of its files are not in" in text
    assert "train/dog/004.png (line 7), train/cat/000.png (line 21)" in text
    data = read(table, skip_bad_images=True)
    assert data.skipped == dict.fromkeys(map(str, gone), "No such file or directory")
    assert len(data.train) + len(data.validation) == 18


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"label": ""}, "has no label in line 2; fill it in"),
        ({"path": ""}, "has no path in line 2"),
        (
            {"split": "holdout"},
            "the column 'split' holds 'holdout' in line 2; it may hold train, val or test",
        ),
        (
            {"path": "./train/dog/008.png"},
            "lists files twice: train/dog/008.png in line 2 and in line 3. Keep one row",
        ),
        (
            {"path": "train/dog/008.png", "label": "cat"},
            "train/dog/008.png in line 2 and in line 3, as cat and as dog.",
        ),
        ({"label": "emu"}, "test has no images of emu"),
    ],
    ids=["label", "path", "split", "twice", "two-classes", "class-without-test-images"],
)
def test_what_is_wrong_is_said_by_its_row(
    image_folder: Callable[..., Path], change: dict[str, str], sentence: str
) -> None:
    folder = image_folder()
    rows = rows_of(folder)
    rows[0] |= change
    text = refuse(write_csv(folder / "list.csv", rows))
    assert sentence in text.replace("./", "")


def test_tables_that_are_none(tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    assert "there is no such list of images" in refuse(tmp_path / "nowhere.csv")
    for name, content, sentence in (
        ("empty.csv", b"", "is empty; its first line must name the columns"),
        ("header.csv", b"path,label\n", "has no row"),
        ("zip.parquet", b"PK\x03\x04", "is no Parquet table that can be read"),
        ("nul.csv", b'path,label\n"a' + b"x" * 200_000, "is no table that can be read (line"),
    ):
        (tmp_path / name).write_bytes(content)
        assert sentence in refuse(tmp_path / name), name
    rows = [{"path": "a.png", "label": "cat"}, {"path": "b.png", "label": "cat"}]
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"")
    assert "has one class only (cat)" in refuse(write_csv(tmp_path / "one.csv", rows))


def test_images_in_the_cells_are_not_what_training_reads(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [b"1", b"2"], "label": [0, 1]}), tmp_path / "list.parquet")
    assert "holds binary, not the names of files" in refuse(tmp_path / "list.parquet")
    pq.write_table(pa.table({"path": ["1", "2"], "label": [0.5, 1.0]}), tmp_path / "list.parquet")
    assert "holds double, not names or whole numbers" in refuse(tmp_path / "list.parquet")


def test_another_label_is_another_list(image_folder: Callable[..., Path]) -> None:
    """The classes are in no file's name: they are part of what a run remembers of its inputs."""
    folder = image_folder()
    rows = rows_of(folder)
    before = read(write_csv(folder / "list.csv", rows)).inputs
    rows[-1]["label"] = "dog"
    after = read(write_csv(folder / "list.csv", rows)).inputs
    assert before is not None
    assert after is not None
    assert before.sha256 != after.sha256
    assert changes(before, after) == ["test/cat/000.png has another label"]


def test_a_list_moves_with_its_images(tmp_path: Path) -> None:
    spec = DataSpec(source="/a/lists/list.csv", root="/a/images")
    moved = DataSpec(source="/b/lists/list.csv", root="/b/images")
    (tmp_path / "lists").mkdir()
    assert spec.moved("/b/lists/list.csv") == moved
    assert spec.moved(str(tmp_path / "lists")).folder == str(tmp_path / "images")
    assert DataSpec(source="/a/list.csv").moved("/b/list.csv").folder == "/b"
