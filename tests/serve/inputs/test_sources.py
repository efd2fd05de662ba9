"""What users name -> items: every kind of source, its order, its names, its labels."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ffl_deploy.errors import UsageError
from ffl_deploy.images import ImageError
from serve.inputs import items, sources
from serve.inputs.items import Item
from serve.inputs.sources import Reading, check_inputs, count_inputs, read_inputs, sorted_names

Predict = Callable[..., Any]
Photo = Callable[..., bytes]
CLASSES = frozenset({"cat", "dog", "frog"})


def paths(*inputs: object, reading: Reading | None = None) -> list[str]:
    return [item.path for item in read_inputs(map(str, inputs), reading or Reading())]


def contents(*inputs: object) -> list[bytes]:
    return [item.read() for item in read_inputs(map(str, inputs), Reading())]


def test_arguments_keep_their_order_and_may_repeat(folder: Path) -> None:
    wanted = [folder / "b.png", folder / "a.jpg", folder / "b.png"]
    assert paths(*wanted) == list(map(str, wanted))


def test_a_folder_gives_its_images_sorted_and_counts_the_rest(folder: Path, photo: Photo) -> None:
    (folder / "A.JPEG").write_bytes(photo(1))
    (folder / "notes.txt").write_text("x")
    (folder / "sub" / "data.csv").write_text("x")
    (folder / "sub.jpg").mkdir()
    (folder / "sub.jpg" / "d.bmp").write_bytes(photo(1, "BMP"))
    reading = Reading()
    assert [str(Path(p).relative_to(folder)) for p in paths(folder, reading=reading)] == [
        "A.JPEG",
        "a.jpg",
        "b.png",
        "sub/c.webp",
        "sub.jpg/d.bmp",
    ], "sorted by name, bytewise, folder by folder"
    assert dict(reading.skipped.reasons) == {"files without an image suffix": 2}


def test_names_sort_as_bytes_also_when_they_are_spilled() -> None:
    names = [f"{i * 7919 % 1000:03d}é\udcff{i}" for i in range(1000)]
    wanted = sorted(names, key=lambda name: name.encode("utf-8", "surrogateescape"))
    assert list(sorted_names(names)) == wanted
    assert list(sorted_names(names, spill=64)) == wanted
    assert list(sorted_names([], spill=1)) == []


def test_globs(folder: Path) -> None:
    assert paths(f"{folder}/*.jpg") == [f"{folder}/a.jpg"]
    assert paths(f"{folder}/**/*.[wp]*") == [f"{folder}/b.png", f"{folder}/sub/c.webp"]
    (folder / "odd[1].jpg").write_bytes(b"")
    assert paths(f"{folder}/odd[1].jpg") == [f"{folder}/odd[1].jpg"], "a file that is really called so"


def test_a_pattern_matches_hidden_files_and_no_folders(folder: Path) -> None:
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "d.jpg").write_bytes(b"")
    (folder / "e.d.jpg").mkdir()
    reading = Reading()
    check_inputs([f"{folder}/**/d.jpg"], reading)
    assert paths(f"{folder}/**/*d.jpg") == [f"{folder}/.hidden/d.jpg"]
    with pytest.raises(UsageError, match="no file matches"):
        check_inputs([f"{folder}/e*"], reading)


def test_a_glob_of_archives_reads_the_archives(tmp_path: Path, photo: Photo) -> None:
    for name in ("1.zip", "2.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("x.jpg", photo(1))
    assert paths(f"{tmp_path}/*.zip") == [f"{tmp_path}/1.zip::x.jpg", f"{tmp_path}/2.zip::x.jpg"]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_archives_keep_their_own_order(tmp_path: Path, photo: Photo, kind: str) -> None:
    source = tmp_path / f"x.{kind}"
    names = ["z.jpg", "cat/a.png", "readme.txt", "a.jpg"]
    if kind == "zip":
        with zipfile.ZipFile(source, "w") as zipped:
            for index, name in enumerate(names):
                zipped.writestr(name, photo(index))
    else:
        with tarfile.open(
            source, "w:" + {"tar": "", "tgz": "gz"}.get(kind, kind.removeprefix("tar."))
        ) as tarred:
            for index, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size = len(photo(index))
                tarred.addfile(info, io.BytesIO(photo(index)))
    reading = Reading(CLASSES)
    found = [(item.path, item.loaded().read(), item.label) for item in read_inputs([str(source)], reading)]
    assert found == [
        (f"{source}::z.jpg", photo(0), None),
        (f"{source}::cat/a.png", photo(1), "cat"),
        (f"{source}::a.jpg", photo(3), None),
    ]
    assert dict(reading.skipped.reasons) == {"files without an image suffix": 1}


def test_csv_paths_are_relative_to_the_table(folder: Path) -> None:
    table = folder / "list.csv"
    table.write_text("﻿id,image,label\n1,a.jpg,cat\n2,sub/c.webp,\n3,,dog\n4,gone.jpg,1\n", encoding="utf-8")
    found = list(read_inputs([str(table)], Reading()))
    assert [item.path for item in found] == ["a.jpg", "sub/c.webp", f"{table}::2", "gone.jpg"]
    assert [item.label for item in found] == ["cat", None, "dog", "1"]
    assert found[0].read() == (folder / "a.jpg").read_bytes()
    assert found[1].read() == (folder / "sub" / "c.webp").read_bytes()


def test_csv_column_flags_and_broken_rows(predict: Predict, folder: Path) -> None:
    table = folder / "list.csv"
    table.write_text(f"uri,truth\na.jpg,cat\n{'x' * 200_000},dog\nb.png,frog\n")
    assert predict(table).code == 2
    assert predict(table, flags=["--column", "nope"]).code == 2
    assert predict(table, flags=["--column", "uri", "--label-column", "nope"]).code == 2
    run = predict(table, flags=["--column", "uri", "--label-column", "truth"])
    assert run.statuses == ["ok", "too_large", "ok"]
    (folder / "empty.csv").write_text("")
    assert predict(folder / "empty.csv").code == 2


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct", "string"])
def test_parquet_of_bytes_structs_and_paths(folder: Path, kind: str) -> None:
    data = [(folder / "a.jpg").read_bytes(), (folder / "b.png").read_bytes()]
    columns: dict[str, Any] = {
        "binary": pa.array(data, pa.binary()),
        "large_binary": pa.array(data, pa.large_binary()),
        "struct": pa.array([{"bytes": item, "path": "x"} for item in data]),
        "string": pa.array(["a.jpg", "b.png"]),
    }
    pq.write_table(pa.table({"image": columns[kind], "label": [2, 0]}), folder / "x.parquet")
    found = list(read_inputs([f"{folder}/x.parquet"], Reading()))
    assert [item.label for item in found] == ["2", "0"]
    assert [item.read() for item in found] == data
    assert [item.path for item in found] == (
        ["a.jpg", "b.png"] if kind == "string" else [f"{folder}/x.parquet::0", f"{folder}/x.parquet::1"]
    )


def test_labels_of_any_kind_and_coding(folder: Path) -> None:
    data = [(folder / "a.jpg").read_bytes()] * 2
    for labels, expected in (
        (pa.array([b"caf\xe9", b"cat"], pa.binary()).cast(pa.string(), safe=False), ["caf\\xe9", "cat"]),
        (pa.array(["dog", "cat"]).dictionary_encode(), ["dog", "cat"]),
        (pa.array([1, None]), ["1", None]),
    ):
        pq.write_table(pa.table({"image": data, "label": labels}), folder / "x.parquet")
        assert [item.label for item in read_inputs([f"{folder}/x.parquet"], Reading())] == expected


def test_a_file_is_read_whole_in_however_small_pieces_it_comes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read() of a network file system may give less than was asked for."""

    class Slow(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            return super().read(min(size, 100) if size >= 0 else 100)

        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:100])

    def slow_open(descriptor: int, mode: str, buffering: int = -1) -> Any:
        return Slow(descriptor) if buffering == 0 else io.BufferedReader(Slow(descriptor))

    monkeypatch.setattr(items, "open", slow_open, raising=False)
    assert items.read_file(str(folder / "a.jpg")) == (folder / "a.jpg").read_bytes()


def test_an_unforeseen_fault_of_a_stream_costs_one_row() -> None:
    def fault() -> bytes:
        raise SystemError("not an image's fault")

    with pytest.raises(ImageError) as caught:
        Item("x", fault, bound=True).loaded().read()
    assert (caught.value.code, str(caught.value)) == ("internal_error", "SystemError: not an image's fault")


def test_standard_input(folder: Path, monkeypatch: pytest.MonkeyPatch, predict: Predict) -> None:
    class Stdin:
        buffer = io.BytesIO(f"{folder}/b.png\r\n\n{folder}/gone.jpg\n{folder}/a.jpg".encode())

    monkeypatch.setattr(sys, "stdin", Stdin)
    run = predict("-")
    assert run.statuses == ["ok", "missing", "ok"]
    assert [Path(row["path"]).name for row in run.rows] == ["b.png", "gone.jpg", "a.jpg"]


def test_folders_named_like_classes_are_labels(tmp_path: Path, photo: Photo) -> None:
    for name in ("test/cat/1.jpg", "test/dog/deep/2.jpg", "test/other/3.jpg", "test/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(photo(1))
    found = {Path(i.path).name: i.label for i in read_inputs([str(tmp_path / "test")], Reading(CLASSES))}
    assert found == {"1.jpg": "cat", "2.jpg": "dog", "3.jpg": None, "4.jpg": None}
    assert [i.label for i in read_inputs([str(tmp_path / "test/cat/1.jpg")], Reading(CLASSES))] == [None]


def test_counting_reads_no_image(
    folder: Path, tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.jpg", photo(1))
    pq.write_table(pa.table({"image": [b"", b""]}), tmp_path / "x.parquet")
    (tmp_path / "x.tar").touch()
    monkeypatch.setattr(Item, "loaded", lambda self: pytest.fail("read"))
    reading = Reading()
    assert (
        count_inputs([str(folder), f"{tmp_path}/*.zip", str(tmp_path / "x.parquet"), "gone.jpg"], reading)
        == 3 + 1 + 2 + 1
    )
    assert count_inputs([str(folder), "-"], reading) is None
    assert count_inputs([str(tmp_path / "x.tar")], reading) is None
    assert not reading.skipped.reasons


def test_a_kind_of_file_that_holds_many_items_is_a_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Playlists, for one test: a path a line."""
    playlist = tmp_path / "x.m3u"
    playlist.write_text(f"{folder}/b.png\n{folder}/a.jpg\n")
    assert paths(playlist) == [str(playlist)]

    def check(path: str, reading: Reading) -> None:
        if not Path(path).read_text():
            raise UsageError(f"{path} is empty.")

    row = sources.Container(
        holds=lambda path: path.endswith(".m3u"),
        items=lambda path, reading: map(items.file_item, Path(path).read_text().splitlines()),
        check=check,
        count=lambda path: len(Path(path).read_text().splitlines()),
    )
    monkeypatch.setattr(sources, "CONTAINERS", (*sources.CONTAINERS, row))
    check_inputs([str(playlist), f"{tmp_path}/*.m3u"], Reading())
    wanted = [str(folder / "b.png"), str(folder / "a.jpg")]
    assert paths(playlist) == wanted
    assert paths(f"{tmp_path}/*.m3u") == wanted
    assert count_inputs([str(playlist), f"{tmp_path}/*.m3u"], Reading()) == 4
    playlist.write_text("")
    for argument in (str(playlist), f"{tmp_path}/*.m3u"):
        with pytest.raises(UsageError, match="is empty"):
            check_inputs([argument], Reading())
