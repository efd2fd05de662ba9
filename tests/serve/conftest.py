"""Images, a runner of ffl-predict and running servers for the tests of this package."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle
from ffl_deploy.command import run_command
from serve.predict.command import main
from serve.server.settings import Limits, ModelSpec, Settings

SMALL = Limits(body_bytes=20_000, demo_json_bytes=5_000, upload_bytes=50_000, bytes_in_flight=100_000)


@dataclass(frozen=True)
class Run:
    """What one ffl-predict did."""

    code: int
    rows: list[dict[str, Any]]
    out: Path
    stdout: str
    stderr: str

    @property
    def statuses(self) -> list[str]:
        return [row["status"] for row in self.rows]

    def row(self, name: str) -> dict[str, Any]:
        """-> the one row whose path ends with `name`."""
        (found,) = [row for row in self.rows if row["path"].endswith(name)]
        return found


def photo_bytes(
    seed: int, format: str = "JPEG", size: tuple[int, int] = (48, 40), **options: object
) -> bytes:
    """-> a seeded image: smooth colours with some noise, so that JPEG has something to do. size: width,
    height."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    pixels = np.clip(
        np.asarray(coarse, np.int16) + rng.integers(-8, 9, (size[1], size[0], 3)), 0, 255
    ).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def photo() -> Callable[..., bytes]:
    return photo_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good images: a.jpg, b.png, sub/c.webp."""
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    (root / "a.jpg").write_bytes(photo_bytes(1))
    (root / "b.png").write_bytes(photo_bytes(2, "PNG"))
    (root / "sub" / "c.webp").write_bytes(photo_bytes(3, "WEBP"))
    return root


@pytest.fixture
def predict(tiny_bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """`predict(input, ..., flags=[...], out="p.jsonl", bundle=None) -> Run`, in this process,
    through the command's own entry."""

    def run(
        *inputs: object,
        flags: Sequence[str] = (),
        out: str = "predictions.jsonl",
        bundle: Bundle | None = None,
    ) -> Run:
        path = tmp_path / "out" / out
        folder = str((bundle or tiny_bundle).folder)
        capfd.readouterr()
        code = run_command(main, [folder, *map(str, inputs), "--out", str(path), *flags])
        captured = capfd.readouterr()
        rows = []
        if path.suffix == ".jsonl" and path.is_file():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return Run(code, rows, path, captured.out, captured.err)

    return run


@dataclass(frozen=True)
class Running:
    """A server inside this process, or a process of its own (then `process` is set)."""

    url: str
    service: Any = None
    process: subprocess.Popen[str] | None = None
    read_log: Callable[[], str] = str

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")


@pytest.fixture(scope="session", autouse=True)
def patient_clients() -> Iterator[None]:
    """httpx gives up after 5 s unless told otherwise; a busy machine may take longer,
    and no test is about that."""
    default = inspect.signature(httpx.get).parameters["timeout"].default
    with pytest.MonkeyPatch.context() as patch:
        for part in ("connect", "read", "write", "pool"):
            patch.setattr(default, part, 60.0)
        yield


@pytest.fixture(scope="session")
def two_bundles(
    make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Bundle]:
    """`fused` and `branch0`: two models of one run, 32 x 32, in one folder."""
    folder = tmp_path_factory.mktemp("run")
    return make_bundle(folder / "fused"), make_bundle(folder / "branch0", seed=1)


@contextlib.contextmanager
def serve_in_thread(settings: Settings) -> Iterator[Running]:
    """The application under uvicorn on a free port; ready when the block starts."""
    import uvicorn

    from serve.app import create_app

    with socket.create_server(("127.0.0.1", 0)) as port:
        app = create_app(replace(settings, port=port.getsockname()[1]))
        service = app.state.service
        service.url = f"http://127.0.0.1:{port.getsockname()[1]}"
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
        thread.start()
        try:
            deadline = time.monotonic() + 120
            while not service.ready:
                assert service.failure is None, service.failure
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield Running(service.url, service)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def start_server() -> Callable[[Settings], contextlib.AbstractContextManager[Running]]:
    return serve_in_thread


@pytest.fixture(scope="module")
def server(two_bundles: tuple[Bundle, Bundle]) -> Iterator[Running]:
    """`fused` and `branch0` over the protocol, without the demo."""
    models = tuple(ModelSpec(bundle.name, bundle.folder) for bundle in two_bundles)
    with serve_in_thread(Settings(models, demo=False)) as running:
        yield running


@contextlib.contextmanager
def start_process(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Running]:
    command = [sys.executable, "-m", "serve.command", *arguments, "--port", "0", "--log-format", "json"]
    log = tempfile.TemporaryFile()  # noqa: SIM115  # closed below; a pipe that nobody reads would stop the server once it is full
    process = subprocess.Popen(command, stderr=log, text=True, env=env, cwd=Path(__file__).parents[2])

    def read_log() -> str:
        # leaves the position, which the process shares, where it is
        return os.pread(log.fileno(), 1 << 24, 0).decode()

    try:
        deadline = time.monotonic() + 120
        while not (ready := [line for line in read_log().split("\n")[:-1] if '"message": "ready"' in line]):
            assert process.poll() is None, read_log()
            assert time.monotonic() < deadline, read_log()
            time.sleep(0.02)
        yield Running(json.loads(ready[0])["url"], process=process, read_log=read_log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        log.close()


@pytest.fixture(scope="session")
def statuses_behind() -> Callable[[Callable[[Any], Any], dict[str, Any]], list[int]]:
    """`statuses_behind(guard, scope)`: what a request is answered by an application that says 200 to all, and
    stands behind `guard`."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def statuses(guard: Callable[[Any], Any], scope: dict[str, Any]) -> list[int]:
        found: list[int] = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                found.append(message["status"])

        asyncio.run(guard(application)(scope, None, send))
        return found

    return statuses


@pytest.fixture(scope="session")
def serve_process() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """`serve_process(*arguments)`: ffl-serve as a process of its own on a free port;
    ready when the block starts."""
    return start_process


@pytest.fixture(scope="module")
def demo(two_bundles: tuple[Bundle, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Both bundles with the demo and small limits."""
    models = tuple(ModelSpec(bundle.name, bundle.folder) for bundle in two_bundles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads") / "gradio"))
        with serve_in_thread(Settings(models, limits=SMALL)) as running:
            yield running
    # of an upload that is refused Gradio leaves the file to the collector, which would warn in another test
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
