"""What the manifest says of its models is what they were exported with: nothing else is served, or
verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.contract import KEY, NOT_BOUND, carries_contract
from ffl_deploy.errors import CheckError
from ffl_deploy.manifest import MANIFEST
from ffl_deploy.runtime.onnx_wire import read_metadata
from ffl_deploy.verify import main

Manifest = dict[str, Any]


@pytest.fixture
def folder(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "tiny"))


def edit(folder: Path, change: Callable[[Manifest], None]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def rotate(manifest: Manifest) -> None:
    manifest["classes"] = manifest["classes"][1:] + manifest["classes"][:1]


def preprocess(field: str, value: object) -> Callable[[Manifest], None]:
    return lambda manifest: manifest["input"]["preprocessing"].update({field: value})


def warm(manifest: Manifest) -> None:
    manifest["calibration"] = {"temperature": 2.0}


EDITS = {
    "classes": rotate,
    "resize": preprocess("resize", "crop"),
    "filter": preprocess("filter", "box"),
    "crop_fraction": preprocess("crop_fraction", 0.5),
    "temperature": warm,
    "target": lambda manifest: manifest.update(target="branch0"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_refused_by_what_was_edited(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By ffl-verify, and before the first answer: its hashes are all right, and the gates compare pixels."""
    edit(folder, EDITS[name])
    assert run_command(main, [str(folder)]) == 1
    said = capsys.readouterr().err
    assert f"model.onnx was exported with {name} " in said
    assert "Traceback" not in said
    bundle = load_bundle(folder)
    with pytest.raises(CheckError, match=f"exported with {name} "):
        bundle.predict([np.zeros((40, 30, 3), np.uint8)])


@pytest.mark.parametrize(
    ("field", "value"), [("color", "BGR"), ("layout", "NCHW"), ("dtype", "float32"), ("name", "pixels")]
)
def test_an_input_that_no_reader_gives_is_no_valid_manifest(folder: Path, field: str, value: str) -> None:
    edit(folder, lambda manifest: manifest["input"].update({field: value}))
    with pytest.raises(CheckError, match=f"not a valid manifest .*{value}.*{field}"):
        load_bundle(folder)


def test_the_models_say_it_to_whoever_reads_them(tiny_bundle: Bundle) -> None:
    said = json.loads(read_metadata(tiny_bundle.folder / "model.onnx")[KEY])
    assert said["classes"] == ["cat", "dog", "frog"]
    assert (said["height"], said["width"], said["resize"], said["color"]) == (32, 32, "stretch", "RGB")
    assert said["temperature"] == 1.0
    assert tiny_bundle.bound


def test_a_bound_bundle_opens_without_a_word(tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "ffl_deploy"):
        load_bundle(tiny_bundle.folder).session(threads=1)
    assert caplog.records == []


def test_a_bundle_from_before_opens_with_a_remark(
    make_bundle: Callable[..., Bundle],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = make_bundle(tmp_path / "old", bound=False)
    assert not bundle.bound
    assert run_command(main, [str(bundle.folder)]) == 0
    assert NOT_BOUND in capsys.readouterr().out
    with caplog.at_level("WARNING", "ffl_deploy"):
        opened = load_bundle(bundle.folder)
        for _ in range(2):
            opened.session(threads=1)
    assert [record.getMessage() for record in caplog.records] == [
        f"{bundle.folder}: {NOT_BOUND}; export it again"
    ]
    edit(bundle.folder, rotate)  # what nothing could see
    assert load_bundle(bundle.folder).predict([np.zeros((8, 8, 3), np.uint8)])


def test_a_damaged_contract_is_a_sentence(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = onnx.load(tiny_bundle.folder / "model.onnx")
    onnx.helper.set_model_props(model, {KEY: "{"})
    onnx.save(model, path)
    with pytest.raises(CheckError, match="damaged contract"):
        carries_contract(path, tiny_bundle.manifest)
    path.write_bytes(b"\xff\xff")
    with pytest.raises(CheckError, match="not a readable ONNX file"):
        read_metadata(path)
