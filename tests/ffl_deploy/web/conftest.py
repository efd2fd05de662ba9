"""The page's scripts run by Node, the page served and opened, a runtime that stands in where none is run."""

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
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.files import sha256_of
from ffl_deploy.web import build
from ffl_deploy.web.build import WebOptions, web_models, write_web
from ffl_deploy.web.runtime import Runtime
from tests.ffl_deploy.web.browser import DESKTOP, Opened

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


@pytest.fixture(scope="session")
def bundles(make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    if given := os.environ.get("FFL_WEB_BUNDLES"):
        return [load_bundle(folder) for folder in given.split(",")]
    folder = tmp_path_factory.mktemp("bundles")
    classes = tuple(f"class{number}" for number in range(12))
    return [
        make_bundle(folder / "fused", classes=classes, cam=True),
        make_bundle(folder / "branch0", classes=classes, seed=1, resize="crop", crop_fraction=0.875),
    ]


@pytest.fixture(scope="session")
def page_folder(
    bundles: list[Bundle], runtime_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """-> a folder whose sub-folder PREFIX is the page."""
    root = tmp_path_factory.mktemp("site")
    given = os.environ.get("FFL_WEB_EXAMPLES")
    options = WebOptions(runtime_folder, examples=(Path(given),) if given else ())
    write_web(web_models([str(bundle.folder) for bundle in bundles]), root / "below" / "a path", options)
    return root


@pytest.fixture(scope="session")
def site(page_folder: Path, serve: Callable[..., Any]) -> Iterator[Any]:
    with serve(page_folder) as served:
        yield served


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Any]]:
    """`launch(*flags)` -> a Chromium. Not for the whole session: while it is there, asyncio has a loop that
    runs, and other tests start their own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = shutil.which("chromium")
        yield lambda *flags: playwright.chromium.launch(executable_path=found, args=["--no-sandbox", *flags])


@pytest.fixture(scope="module")
def chromium(launch: Callable[..., Any]) -> Iterator[Any]:
    browser = launch("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    yield browser
    browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Opened]]:
    """`open_page(url, viewport=..., ...)`; at the end nothing was amiss on any of them."""
    opened: list[Opened] = []

    def start(url: str, viewport: dict[str, int] = DESKTOP, **options: Any) -> Opened:
        context = chromium.new_context(viewport=viewport, accept_downloads=True, **options)
        opened.append(Opened(context, url))
        return opened[-1]

    yield start
    for page in opened:
        page.context.close()
        assert page.troubles == []
