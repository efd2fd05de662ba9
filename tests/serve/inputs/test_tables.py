"""Tables and lists in the forms that people have them: what is an image in them, and what its label is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ffl_deploy.errors import UsageError
from ffl_deploy.images import ImageError
from serve.inputs.items import Item
from serve.inputs.sources import Reading, check_inputs, count_inputs, read_inputs

Photo = Callable[..., bytes]
Predict = Callable[..., Any]


def read(*inputs: object) -> list[Item]:
    check_inputs(map(str, inputs), Reading())
    return list(read_inputs(map(str, inputs), Reading()))


@pytest.fixture
def images(tmp_path: Path, photo: Photo) -> Path:
    for number, name in enumerate(("a.jpg", "b.jpg")):
        (tmp_path / name).write_bytes(photo(number))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", "path,label\na.jpg,cat\nb.jpg,dog\n"),
        ("x.csv", "path;label\na.jpg;cat\nb.jpg;dog\n"),
        ("x.csv", "Path, Label\na.jpg, cat\nb.jpg, dog\n"),
        ("x.tsv", "image\tclass\na.jpg\tcat\nb.jpg\tdog\n"),
        ("x.csv", "img\tfine_label\na.jpg\tcat\nb.jpg\tdog\n"),
        ("x.jsonl", '{"path": "a.jpg", "label": "cat"}\n\n{"label": "dog", "path": "b.jpg"}\n'),
    ],
    ids=["csv", "semicolon", "spaces", "tsv", "tabs-in-csv", "jsonl"],
)
def test_text_tables(name: str, text: str, images: Path) -> None:
    (images / name).write_text(text)
    items = read(images / name)
    assert [(item.path, item.label) for item in items] == [("a.jpg", "cat"), ("b.jpg", "dog")]
    assert [item.read() for item in items] == [(images / n).read_bytes() for n in ("a.jpg", "b.jpg")]


def test_a_list_of_paths(images: Path) -> None:
    (images / "x.txt").write_text("a.jpg\n\nb.jpg\r\ngone.jpg\n")
    items = read(images / "x.txt")
    assert [item.path for item in items] == ["a.jpg", "b.jpg", "gone.jpg"]
    assert items[1].read() == (images / "b.jpg").read_bytes()
    with pytest.raises(ImageError, match="no such file"):
        items[2].read()
    (images / "notes.txt").write_text("what I did today\n")
    assert [item.path for item in read(images / "notes.txt")] == [str(images / "notes.txt")]


def test_lines_that_are_no_rows_say_so(images: Path) -> None:
    lines = ['{"path": "a.jpg"}', "[1]", '{"path": 5}', "{}", '{"path": "' + "x" * (2 << 20) + '"}']
    (images / "x.jsonl").write_text("\n".join([*lines, lines[0]]))
    codes = []
    for item in read(images / "x.jsonl"):
        try:
            codes.append(str(len(item.read()) > 0))
        except ImageError as error:
            codes.append(error.code)
    assert codes == ["True", "corrupt", "corrupt", "null", "too_large", "True"]


def hugging_face(table: pa.Table, names: list[str]) -> pa.Table:
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def of_bytes(contents: list[bytes | None], labels: list[int]) -> pa.Table:
    cells = [{"bytes": content, "path": "a.jpg"} for content in contents]
    return pa.table({"image": cells, "label": pa.array(labels, pa.int64())})


def written(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".feather":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather"])
def test_numbers_are_the_names_that_the_table_gives_them(name: str, images: Path, photo: Photo) -> None:
    """Another order than the bundle's gave an accuracy of 10 % without a word."""
    table = hugging_face(
        of_bytes([photo(0), photo(1), None, photo(2)], [2, 0, 1, -1]), ["frog", "dog", "cat"]
    )
    items = read(written(images / name, table))
    assert [item.label for item in items] == ["cat", "frog", "dog", None]
    assert [item.path for item in items][:3] == [f"{images}/{name}::0", f"{images}/{name}::1", "a.jpg"]
    assert items[1].read() == photo(1)
    assert items[2].read() == (images / "a.jpg").read_bytes(), "its bytes are null, its path is there"


def test_without_names_numbers_stay_numbers(images: Path, photo: Photo) -> None:
    items = read(written(images / "x.parquet", of_bytes([photo(0)], [2])))
    assert [item.label for item in items] == ["2"]


@pytest.mark.parametrize(
    "kind", [pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.large_string()], ids=str
)
def test_paths_in_every_kind_of_text(kind: Any, images: Path) -> None:
    paths = pa.array(["a.jpg", "b.jpg"]).cast(kind)
    items = read(written(images / "x.arrow", pa.table({"path": paths})))
    assert [item.path for item in items] == ["a.jpg", "b.jpg"]
    assert items[1].read() == (images / "b.jpg").read_bytes()


def test_a_folder_that_is_a_table(tmp_path: Path, photo: Photo) -> None:
    folder = tmp_path / "ds.parquet"
    folder.mkdir()
    for number in (1, 0):
        written(folder / f"part-{number:05}.parquet", of_bytes([photo(number), photo(number + 5)], [0, 1]))
    (folder / "_SUCCESS").touch()
    (folder / "dataset_info.json").write_text("{}")
    items = read(folder)
    assert [item.read() for item in items] == [photo(0), photo(5), photo(1), photo(6)]
    assert count_inputs([str(folder)], Reading()) == 4
    (folder / "z.jpg").write_bytes(photo(9))
    assert [item.path for item in read(folder)] == [str(folder / "z.jpg")], "a folder of images, as ever"


def test_a_table_that_cannot_be_read_is_refused_before_any_work(tmp_path: Path) -> None:
    for name, content, words in (
        ("x.arrow", b"ARROW1 no", "not an Arrow table"),
        ("y.arrow", b"nothing", "not an Arrow table"),
        ("x.jsonl", b"no\n", "no JSON object in its first line"),
        ("x.csv", b"a,b\n1,2\n", "give --column one of: a, b"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=words):
            check_inputs([str(tmp_path / name)], Reading())


def test_the_accuracy_is_that_of_the_tables_own_names(predict: Predict, tmp_path: Path, photo: Photo) -> None:
    contents = [photo(number) for number in range(6)]
    (tmp_path / "plain").mkdir()
    for number, content in enumerate(contents):
        (tmp_path / "plain" / f"{number}.jpg").write_bytes(content)
    best = [row["label"] for row in predict(tmp_path / "plain").rows]
    names = ["frog", "dog", "cat"]  # the bundle has them the other way round
    table = hugging_face(of_bytes(list(contents), [names.index(label) for label in best]), names)
    run = predict(written(tmp_path / "x.parquet", table), out="x.jsonl")
    assert "accuracy 100.00% over 6 labelled rows" in run.stdout


def test_labels_that_are_no_class_are_said_aloud(predict: Predict, images: Path) -> None:
    (images / "x.csv").write_text("path,label\na.jpg,Cat\nb.jpg,Hund\n")
    run = predict(images / "x.csv")
    assert run.code == 0
    assert "2 rows have a label that is no class of the bundle (its classes: cat, dog, frog)" in run.stdout
    summary = json.loads((run.out.parent / f"{run.out.name}.summary.json").read_text())
    assert summary["labelled"]["rows_with_unknown_label"] == 2


def test_a_sample_of_a_tar_is_labelled_by_what_stands_beside_it(
    predict: Predict, tmp_path: Path, photo: Photo
) -> None:
    import tarfile

    members = [
        ("000.cls", b"2\n"), ("000.jpg", photo(0)),
        ("001.jpg", photo(1)), ("001.json", b'{"label": "dog", "other": {}}'),
        ("cat/002.jpg", photo(2)),
        ("003.cls", b"no class"), ("003.jpg", photo(3)),
        ("004.cls", b"1"),
        ("005.json", b"{"), ("005.png", photo(5, "PNG")),
    ]  # fmt: skip
    (tmp_path / "x.tar").touch()
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "x.tar").write_bytes(raw.getvalue())
    (tmp_path / "x.tar.zst").write_bytes(pa.Codec("zstd").compress(raw.getvalue(), asbytes=True))
    for name in ("x.tar", "x.tar.zst"):
        reading = Reading(frozenset({"cat", "dog", "frog"}))
        items = [item.loaded() for item in read_inputs([str(tmp_path / name)], reading)]
        assert [item.label for item in items] == ["2", "dog", "cat", "no class", None], name
        assert [item.read() for item in items] == [
            content for n, content in members if n[-3:] in ("jpg", "png")
        ]
        assert dict(reading.skipped.reasons) == {"labels without an image": 1}
    run = predict(tmp_path / "x.tar.zst")
    assert run.statuses == ["ok"] * 5
    # a tar that breaks off gives what came before
    (tmp_path / "cut.tar").write_bytes(raw.getvalue()[: 512 * 3 + len(photo(0)) // 2])
    assert predict(tmp_path / "cut.tar").statuses == ["truncated", "corrupt_archive"]
