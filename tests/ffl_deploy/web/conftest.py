"""The page's scripts run by Node, the page served, and a runtime that stands in where none is run."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ffl_deploy.web
from ffl_deploy.files import sha256_of
from ffl_deploy.web import build
from ffl_deploy.web.runtime import Runtime

PAGE = Path(ffl_deploy.web.__file__).parent / "page"
NO_NODE = "needs node on the PATH"
NO_NPM = "needs npm on the PATH, or FFL_WEB_RUNTIME=DIR with the files of onnxruntime-web"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files in the place of onnxruntime-web, known to the builder by their hashes;
    no browser opens them."""
    folder = tmp_path / "stand-in"
    folder.mkdir()
    for name in ("module.mjs", "code.wasm"):
        (folder / name).write_text(f"not {name}")
    hashes = {name: sha256_of(folder / name) for name in ("module.mjs", "code.wasm")}
    monkeypatch.setattr(build, "WASM", Runtime("module.mjs", "code.wasm", hashes))
    return folder


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., Any]:
    """`node(script, value)` -> what the script's `main(value)` returns;
    the page's modules are in "./page/"."""
    if shutil.which("node") is None:
        pytest.skip(NO_NODE)
    folder = tmp_path / "node"
    shutil.copytree(PAGE, folder / "page")
    (folder / "package.json").write_text('{"type": "module"}')

    def run(script: str, value: Any) -> Any:
        (folder / "value.json").write_text(json.dumps(value))
        (folder / "script.js").write_text(
            script + '\nimport { readFileSync, writeFileSync } from "node:fs";\n'
            'const value = JSON.parse(readFileSync("value.json"));\n'
            'writeFileSync("result.json", JSON.stringify(await main(value)));\n'
        )
        done = subprocess.run(["node", "script.js"], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "result.json").read_text())

    return run


@pytest.fixture(scope="session")
def runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real onnxruntime-web, downloaded once for all tests."""
    if given := os.environ.get("FFL_WEB_RUNTIME"):
        return Path(given)
    return _npm_package(f"onnxruntime-web@{build.VERSION}", tmp_path_factory.mktemp("runtime"))


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, which finds what people with a screen reader or a keyboard stumble over."""
    return (_npm_package("axe-core@4.14.1", tmp_path_factory.mktemp("axe")) / "axe.min.js").read_text()


def _npm_package(name: str, folder: Path) -> Path:
    """-> the unpacked package; skips where npm is not installed."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(NO_NPM)
    command = [npm, "pack", name, "--prefer-offline", "--ignore-scripts", "--pack-destination", str(folder)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


class Served:
    """A folder behind an address; `requests` are the paths that were asked for, in order."""

    def __init__(self, url: str, requests: list[str]) -> None:
        self.url = url
        self.requests = requests


@pytest.fixture(scope="session")
def serve() -> Callable[..., contextlib.AbstractContextManager[Served]]:
    """`with serve(folder, headers={}) as served`: as any plain file server does it."""

    @contextlib.contextmanager
    def start(folder: Path, headers: dict[str, str] | None = None) -> Iterator[Served]:
        asked: list[str] = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def end_headers(self) -> None:
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                super().end_headers()

            def log_message(self, *_: Any) -> None:
                asked.append(self.path)

        handler = functools.partial(Handler, directory=str(folder))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            try:
                yield Served(f"http://127.0.0.1:{server.server_port}/", asked)
            finally:
                server.shutdown()
                thread.join()

    return start
