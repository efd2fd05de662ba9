"""What a manifest promises of its folder, and what of a folder is refused before anything in it is used."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.bundle_files import GoldenSamples, write_golden
from ffl_deploy.errors import CheckError, FflError, UsageError
from ffl_deploy.files import sha256_of
from ffl_deploy.manifest import MANIFEST, Precision, Variant, file_records, write_manifest


@pytest.fixture
def folder(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the shared bundle, to be changed."""
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "tiny"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as JSON: what the program itself would refuse to write."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def relist(folder: Path, golden: bytes | None = None) -> Bundle:
    """-> the bundle with its hashes as the files are now,
    so that only what is inside them can be found wrong."""
    if golden is not None:
        (folder / "golden.npz").write_bytes(golden)
    manifest = load_bundle(folder).manifest
    records = file_records(folder)
    variants = [msgspec.structs.replace(v, sha256=records[v.file].sha256) for v in manifest.variants]
    sha256 = records["golden.npz"].sha256
    samples = msgspec.structs.replace(manifest.golden, sha256=sha256)
    write_manifest(
        folder, msgspec.structs.replace(manifest, files=records, variants=variants, golden=samples)
    )
    return load_bundle(folder)


def complaint(folder: Path, kind: type[FflError] = CheckError) -> str:
    """-> with what one sentence `folder` is refused."""
    with pytest.raises(kind) as caught:
        load_bundle(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_the_manifest_lists_every_file_but_itself_with_hash_and_size(folder: Path) -> None:
    (folder / "engines" / "deep").mkdir(parents=True)
    (folder / "engines" / "deep" / "x.engine").write_bytes(b"12345")
    records = file_records(folder)
    assert list(records) == ["README.md", "engines/deep/x.engine", "golden.npz", "model.onnx"]
    for name, record in records.items():
        assert (record.sha256, record.bytes) == (sha256_of(folder / name), (folder / name).stat().st_size)


def test_equal_contents_are_equal_bytes(
    tiny_bundle: Bundle, make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    again = make_bundle(tmp_path / "tiny")
    for name in (MANIFEST, *tiny_bundle.manifest.files):
        assert (again.folder / name).read_bytes() == (tiny_bundle.folder / name).read_bytes(), name
    assert again.sha256 == tiny_bundle.sha256
    other = make_bundle(tmp_path / "other", seed=1)
    assert other.sha256 != tiny_bundle.sha256
    samples = tiny_bundle.golden()
    records = [write_golden(tmp_path / name, samples, "noise") for name in ("one", "two")]
    assert records[0] == records[1]
    assert records[0].count == len(samples.labels)
    write_manifest(tmp_path / "one", tiny_bundle.manifest)
    assert (tmp_path / "one" / MANIFEST).read_bytes() == (tiny_bundle.folder / MANIFEST).read_bytes()


def test_golden_samples_come_back_as_they_were_written(folder: Path) -> None:
    samples = load_bundle(folder).golden()
    changed = GoldenSamples(samples.images[:2], np.array([-1, 2]), samples.logits[:2] + 1)
    write_golden(folder, changed, "elsewhere")
    found = relist(folder).golden()
    for one, other in zip(found, changed, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


ESCAPES = ("../x.onnx", "/etc/passwd", "a/../../x", "a\\..\\x", "./model.onnx", "a//b", "", ".", MANIFEST)


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leads_out_of_the_folder(folder: Path, name: str) -> None:
    """In none of the three places in which a manifest names files."""
    intact = (folder / MANIFEST).read_bytes()
    record = {"sha256": "0" * 64, "bytes": 1}

    def in_variant(manifest: dict[str, Any]) -> None:
        manifest["variants"][0]["file"] = name
        manifest["files"][name] = record

    def in_golden(manifest: dict[str, Any]) -> None:
        manifest["golden"]["file"] = name
        manifest["files"][name] = record

    def in_files(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = record

    for change in (in_variant, in_golden, in_files):
        (folder / MANIFEST).write_bytes(intact)
        rewrite(folder, change)
        assert "not a file inside the bundle" in complaint(folder)


def drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        del manifest[path[-1]]

    return change


def put(value: object, *path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put(99, "schema"), "schema 99, this version reads 1"),
        (put([], "classes"), "lists no classes or no variants"),
        (put([], "variants"), "lists no classes or no variants"),
        (put(["cat", "dog"], "classes"), "lists 2 classes, but logits of shape"),
        (drop("files", "model.onnx"), "does not list the hash of model.onnx"),
        (drop("files", "golden.npz"), "does not list the hash of golden.npz"),
        (put("0" * 64, "variants", 0, "sha256"), "two different hashes for model.onnx"),
        (put("0" * 64, "golden", "sha256"), "two different hashes for golden.npz"),
        (drop("golden"), "not a valid manifest"),
        (put("many", "variants", 0, "bytes"), "not a valid manifest"),
        (put(0, "input", "preprocessing", "height"), "not a valid manifest"),
        (put(-1, "input", "preprocessing", "width"), "not a valid manifest"),
        (put(0.0, "input", "preprocessing", "crop_fraction"), "not a valid manifest"),
        (put(0, "input", "batch"), "not a valid manifest"),
        (put("fp8", "variants", 0, "precision", "stored"), "not a valid manifest"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    rewrite(folder, change)
    assert says in complaint(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])
def test_a_manifest_that_is_no_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert "not a valid manifest" in complaint(folder)


def test_where_there_is_no_bundle_it_is_said_where_one_is(folder: Path, tmp_path: Path) -> None:
    assert "there is no folder" in complaint(tmp_path / "nowhere", UsageError)
    assert "is a file and not a bundle" in complaint(folder / "model.onnx", UsageError)
    assert "give one of the bundles inside it: tiny" in complaint(tmp_path, UsageError)
    (tmp_path / "empty").mkdir()
    assert "write one with ffl-export" in complaint(tmp_path / "empty", UsageError)


@pytest.mark.parametrize("damage", ["changed", "longer", "missing", "folder"])
def test_a_file_is_checked_before_it_is_opened(folder: Path, damage: str) -> None:
    bundle, path = load_bundle(folder), folder / "model.onnx"
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[100] ^= 1
        path.write_bytes(content)
    elif damage == "longer":
        path.write_bytes(content + b"\0")
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    sentence = "was changed since export" if damage in ("changed", "longer") else "is missing"
    for use in (
        bundle.session,
        lambda: bundle.predict([np.zeros((4, 4, 3), np.uint8)]),
        lambda: bundle.checked_file("model.onnx"),
    ):
        with pytest.raises(CheckError, match=sentence):
            use()
    (folder / "golden.npz").write_bytes(b"")
    with pytest.raises(CheckError, match=r"golden\.npz was changed"):
        bundle.golden()


def test_external_data_is_refused_although_every_hash_is_right(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    bundle = relist(folder)
    assert "weights.bin" in bundle.manifest.files
    with pytest.raises(CheckError, match="in another file"):
        bundle.session()


def test_a_model_nested_without_end_is_refused(folder: Path) -> None:
    """A graph in an attribute of a node of a graph, two thousand times:
    the reader of the wire format is recursive."""

    def field(number: int, content: bytes) -> bytes:
        length, size = bytearray(), len(content)
        while size > 0x7F:
            length.append(size & 0x7F | 0x80)
            size >>= 7
        return bytes([number << 3 | 2]) + bytes(length) + bytes([size]) + content

    graph = b""
    for _ in range(2000):
        graph = field(1, field(5, field(6, graph)))  # graph.node, node.attribute, attribute.g
    (folder / "model.onnx").write_bytes(field(7, graph))
    with pytest.raises(CheckError, match="not a readable ONNX file"):
        relist(folder).session()


def archive(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def lone_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


IMAGES, LABELS, LOGITS = (
    np.zeros((2, 32, 32, 3), np.uint8),
    np.zeros(2, np.int64),
    np.zeros((2, 3), np.float32),
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is damaged"),
        (b"no archive at all", "is damaged"),
        (lone_array(), "is damaged"),
        (archive(images=np.array([{}], object), labels=LABELS, logits=LOGITS), "is damaged"),
        (archive(images=IMAGES, labels=LABELS, logits=LOGITS)[:-40], "is damaged"),
        (archive(images=IMAGES, labels=LABELS), "holds no logits"),
        (archive(images=IMAGES, labels=LABELS, logits=LOGITS[:1]), "does not hold samples"),
        (archive(images=IMAGES[:, :16], labels=LABELS, logits=LOGITS), "does not hold samples"),
        (archive(images=IMAGES.astype(np.float32), labels=LABELS, logits=LOGITS), "does not hold samples"),
        (archive(images=IMAGES, labels=LABELS, logits=LOGITS[:, :2]), "does not hold samples"),
        (archive(images=IMAGES[:0], labels=LABELS[:0], logits=LOGITS[:0]), "does not hold samples"),
        (archive(images=np.float32(1), labels=np.float32(1), logits=np.float32(1)), "does not hold samples"),
    ],
)
def test_golden_samples_that_are_none_are_refused_although_their_hash_is_right(
    folder: Path, content: bytes, says: str
) -> None:
    bundle = relist(folder, content)
    with pytest.raises(CheckError, match=says) as caught:
        bundle.golden()
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(("calibration", "temperature"), [(None, 1.0), ({}, 1.0), ({"temperature": 2}, 2.0)])
def test_the_temperature_is_one_unless_it_was_fitted(
    folder: Path, calibration: Any, temperature: float
) -> None:
    rewrite(folder, put(calibration, "calibration"))
    assert load_bundle(folder).temperature == temperature


@pytest.mark.parametrize("value", ["1", None, 0, -1.5, True, [1]])
def test_a_temperature_that_is_none_is_refused(folder: Path, value: Any) -> None:
    rewrite(folder, put({"temperature": value}, "calibration"))
    with pytest.raises(CheckError, match="gives the temperature"):
        _ = load_bundle(folder).temperature


def test_the_variant_is_fp32_unless_another_is_asked_for_or_the_only_one(tiny_bundle: Bundle) -> None:
    def variant(name: str) -> Variant:
        return Variant(name, "onnxruntime", "model.onnx", "0", 1, Precision("fp32", "fp32"))

    def bundle(*names: str) -> Bundle:
        return Bundle(
            tiny_bundle.folder,
            msgspec.structs.replace(tiny_bundle.manifest, variants=[variant(n) for n in names]),
        )

    assert bundle("int8", "fp32").variant().name == "fp32"
    assert bundle("int8", "fp32").variant("int8").name == "int8"
    assert bundle("int8").variant().name == "int8"
    with pytest.raises(UsageError, match=r"no variant 'fp23'. Did you mean 'fp32'\? Known: int8, fp32"):
        bundle("int8", "fp32").variant("fp23")


def test_equal_probabilities_keep_the_order_of_the_classes(tiny_bundle: Bundle) -> None:
    answer = tiny_bundle.prediction(np.zeros(3, np.float32), np.array([0.3, 0.35, 0.35], np.float32), top_k=9)
    assert (answer.label, answer.label_id) == ("dog", 1)
    assert [label for label, _ in answer.top] == ["dog", "frog", "cat"]
