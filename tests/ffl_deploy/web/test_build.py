"""The builder: which files a page has, what it refuses, and that it imports no torch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle
from ffl_deploy.command import run_command
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.images import decode
from ffl_deploy.manifest import MANIFEST
from ffl_deploy.parity import PARITY_GATES
from ffl_deploy.web import runtime
from ffl_deploy.web.build import WebOptions, web_models, write_web
from ffl_deploy.web.command import main
from ffl_deploy.web.runtime import WASM, WEBGPU, runtime_files


@pytest.fixture
def options(stand_in: Path) -> WebOptions:
    return WebOptions(runtime_folder=stand_in)


def test_every_file_is_there_with_its_hash(tiny_bundle: Bundle, options: WebOptions, tmp_path: Path) -> None:
    Image.new("RGB", (9, 8), "red").save(tmp_path / "a red one.png")
    given = WebOptions(options.runtime_folder, examples=(tmp_path / "a red one.png",))
    folder = tmp_path / "page"
    size = write_web(web_models([str(tiny_bundle.folder)]), folder, given)

    records = json.loads((folder / "files.json").read_text())
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert on_disk == {*records, "files.json", "sw.js"}
    for name, record in records.items():
        content = (folder / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}, name
    assert size == sum(record["bytes"] for record in records.values())
    assert "MIT License" in (folder / "runtime" / "LICENSE.txt").read_text()

    page = json.loads((folder / "page.json").read_text())
    (model,) = page["models"]
    variant = tiny_bundle.variant()
    assert (folder / model["file"]).read_bytes() == (tiny_bundle.folder / variant.file).read_bytes()
    assert records[model["file"]]["sha256"] == variant.sha256
    assert (folder / model["manifest"]).read_bytes() == (tiny_bundle.folder / MANIFEST).read_bytes()
    assert model["gate"]["scaled_max_diff"] == PARITY_GATES["fp32"].scaled_max_diff
    for place in (*page["examples"], *(probe["file"] for probe in page["probes"])):
        assert place in records
        assert " " not in place
    worker = (folder / "sw.js").read_text()
    assert "@" not in worker
    assert all(f'"{name}"' in worker for name in records)


def test_the_service_worker_changes_with_any_file(tiny_bundle: Bundle, options: WebOptions, tmp_path: Path,
                                                  make_bundle: Callable[..., Bundle]) -> None:  # fmt: skip
    workers = []
    for bundle in (tiny_bundle, tiny_bundle, make_bundle(tmp_path / "other" / tiny_bundle.name, seed=3)):
        write_web(web_models([str(bundle.folder)]), tmp_path / "page", options)
        workers.append((tmp_path / "page" / "sw.js").read_text())
    assert workers[0] == workers[1]  # the same bundle gives the same page
    assert workers[1] != workers[2]


def test_a_page_is_written_again_and_other_folders_are_not_touched(
    tiny_bundle: Bundle, options: WebOptions, tmp_path: Path
) -> None:
    models, folder = web_models([str(tiny_bundle.folder)]), tmp_path / "page"
    write_web(models, folder, options)
    (folder / ".git").mkdir()
    (folder / "CNAME").write_text("example.org")
    (folder / "models" / "old").mkdir()
    write_web(models, folder, options)
    assert (folder / ".git").is_dir()
    assert (folder / "CNAME").read_text() == "example.org"
    assert [path.name for path in (folder / "models").iterdir()] == ["tiny"]

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="holds no page"):
        write_web(models, photos, options)
    assert [path.name for path in photos.iterdir()] == ["holiday.jpg"]


def test_names_and_variants(make_bundle: Callable[..., Bundle], options: WebOptions, tmp_path: Path) -> None:
    one = make_bundle(tmp_path / "a" / "same", variants=("fp32", "int8"))
    two = make_bundle(tmp_path / "b" / "same", seed=1)
    assert [model.name for model in web_models([str(one.folder)], ["fp32", "int8"])] == [
        "same-fp32",
        "same-int8",
    ]
    with pytest.raises(UsageError, match="two models are called same"):
        write_web(web_models([str(one.folder), str(two.folder)]), tmp_path / "page", options)
    with pytest.raises(UsageError, match="cannot be a folder"):
        write_web(web_models([f"a b={one.folder}"]), tmp_path / "page", options)
    with pytest.raises(UsageError, match="no variant 'int9'"):
        web_models([str(one.folder)], ["int9"])
    with pytest.raises(UsageError, match="--variant auto is found out"):
        web_models([str(one.folder)], ["auto"])
    assert not (tmp_path / "page").exists()
    write_web(web_models([f"first={one.folder}", str(two.folder)]), tmp_path / "page", options)
    title = "first and same on noise"
    assert f"<title>{title}</title>" in (tmp_path / "page" / "index.html").read_text()


def test_a_damaged_bundle_gives_no_page(
    make_bundle: Callable[..., Bundle], options: WebOptions, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "broken")
    model = bundle.folder / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckError, match="was changed since export"):
        write_web(web_models([str(bundle.folder)]), tmp_path / "page", options)
    assert not (tmp_path / "page").exists()


def test_what_is_no_picture_is_no_example(tiny_bundle: Bundle, options: WebOptions, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    given = WebOptions(options.runtime_folder, examples=(tmp_path / "notes.txt",))
    with pytest.raises(UsageError, match=r"--examples .*notes\.txt cannot be shown"):
        write_web(web_models([str(tiny_bundle.folder)]), tmp_path / "page", given)


def test_the_probes_say_what_python_decodes(tiny_bundle: Bundle, options: WebOptions, tmp_path: Path) -> None:
    import base64

    write_web(web_models([str(tiny_bundle.folder)]), tmp_path / "page", options)
    probes = json.loads((tmp_path / "page" / "page.json").read_text())["probes"]
    assert [probe["allowed"] for probe in probes] == [0, 0, 3]
    for probe in probes:
        decoded = decode((tmp_path / "page" / probe["file"]).read_bytes())
        assert (decoded.width, decoded.height) == (probe["width"], probe["height"])
        assert base64.b64decode(probe["pixels"]) == decoded.pixels.tobytes()
        assert len(np.unique(decoded.pixels)) > 50


@pytest.mark.parametrize("pinned", [WASM, WEBGPU])
def test_a_runtime_of_another_version_is_refused(pinned: runtime.Runtime, tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=f"does not hold {pinned.module} and {pinned.wasm}"),
        runtime_files(pinned, tmp_path),
    ):
        pass
    for name in pinned.sha256:
        (tmp_path / name).write_bytes(b"another version")
    with (
        pytest.raises(CheckError, match=r"is not the one of onnxruntime-web 1\.30\.0"),
        runtime_files(pinned, tmp_path),
    ):
        pass


def test_without_npm_the_sentence_names_both_ways(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    assert run_command(main, [str(tiny_bundle.folder), "--out", str(tmp_path / "page")]) == 2
    error = capsys.readouterr().err
    assert "install Node.js" in error
    assert "--runtime-folder DIR" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page").exists()


def test_a_download_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(CheckError, match=r"could not download .*ENOTFOUND"), runtime_files(WASM):
        pass


def test_the_command_imports_no_torch(tiny_bundle: Bundle, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom ffl_deploy.web import build, command, runtime\n"
        "build.WASM = runtime.Runtime('a', 'b', {})\n"  # no file to copy
        "code = command.main(sys.argv[1:])\n"
        "print(code, [name for name in ('torch', 'onnx', 'onnxruntime', 'export', 'serve') if name in "
        "sys.modules])"
    )
    command = [sys.executable, "-c", script, str(tiny_bundle.folder), "--out", str(tmp_path / "page")]
    done = subprocess.run(
        [*command, "--runtime-folder", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["0 []"], done.stderr
