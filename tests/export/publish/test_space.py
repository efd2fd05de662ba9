"""The Space starts as it is: its own sources, its own bundles, nothing else."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from export.publish.space import require_space, requirements, write_space
from ffl_deploy.bundle import load_bundle
from ffl_deploy.bundle_checks import verify
from ffl_deploy.errors import UsageError
from ffl_deploy.web import build
from ffl_deploy.web.build import WebOptions
from ffl_deploy.web.runtime import Runtime


def test_a_space_holds_what_it_needs(exported: Path, tmp_path: Path) -> None:
    space = tmp_path / "space"
    write_space([load_bundle(exported / "fused")], space, "gradio")
    head = (space / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in head
    assert "app_file: app.py" in head
    assert list(verify(load_bundle(space / "bundles" / "fused"), "fp32"))
    names = (space / "requirements.txt").read_text()
    for name in ("gradio", "onnxruntime", "numpy", "msgspec"):
        assert name in names
    for name in ("torch", "tensorrt", "ffl-deploy"):
        assert name not in names
    assert not list(space.rglob("__pycache__"))
    assert requirements() == sorted(set(requirements()))
    (space / ".git").mkdir()
    (space / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (space / "assets").mkdir()
    (space / "assets" / "logo.svg").write_text("<svg/>")
    # a Space may be written again, and stays a clone
    write_space([load_bundle(exported / "branch0")], space, "gradio")
    assert (space / ".git" / "HEAD").is_file()
    assert (space / "assets" / "logo.svg").read_text() == "<svg/>"
    assert [path.name for path in (space / "bundles").iterdir()] == ["branch0"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="holds no Space"):
        write_space([load_bundle(exported / "fused")], tmp_path / "photos")


def test_a_static_space_is_the_page_with_its_settings(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the runtime has tests of its own
    monkeypatch.setattr(build, "WASM", Runtime("module.mjs", "code.wasm", {}))
    space, options = tmp_path / "space", WebOptions(runtime_folder=tmp_path)
    write_space([load_bundle(exported / "fused")], space, "gradio")
    (space / ".git").mkdir()
    write_space([load_bundle(exported / "fused"), load_bundle(exported / "branch0")], space, options=options)
    assert not (space / "app.py").exists()  # the other form's files are gone, git's are not
    assert (space / ".git").is_dir()
    head = (space / "README.md").read_text().split("---")[1]
    assert (
        "sdk: static\napp_file: index.html\ncustom_headers:\n  cross-origin-embedder-policy: require-corp\n"
        in head
    )
    assert sorted(path.name for path in (space / "models").iterdir()) == ["branch0", "fused"]
    assert "README.md" not in json.loads((space / "files.json").read_text())
    write_space([load_bundle(exported / "fused")], space, options=options, variants=["int8"])
    (model,) = json.loads((space / "page.json").read_text())["models"]
    assert (model["name"], model["variant"]) == ("fused", "int8")
    assert (space / model["file"]).name == "model.int8.onnx"
    write_space([load_bundle(exported / "branch0")], space, "gradio")
    assert not (space / "index.html").exists()


def test_the_clone_of_a_new_space_is_accepted(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitattributes").write_text("")
    (tmp_path / "README.md").write_text("---\ntitle: New\nsdk: gradio\n---\n")
    require_space(tmp_path)
    (tmp_path / "README.md").write_text("# My notes\n")
    with pytest.raises(UsageError, match="holds no Space"):
        require_space(tmp_path)


@pytest.mark.slow
def test_a_space_starts(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    space = tmp_path / "space"
    write_space([load_bundle(exported / "branch0")], space, "gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SPACE_ID")
    }
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env={**environment, "PORT": str(port)}, stderr=subprocess.PIPE
    )
    try:
        for _ in range(240):
            time.sleep(0.5)
            assert process.poll() is None, process.stderr.read().decode()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    page = answer.read().decode()
                break
            except OSError:
                continue
        assert "gradio" in page.lower()
    finally:
        process.terminate()
        process.communicate(timeout=60)
