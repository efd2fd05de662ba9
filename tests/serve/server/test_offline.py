"""Nothing calls home, every temporary file goes with the process, and nothing heavy is imported unasked."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ffl_deploy.bundle import Bundle
from serve.server.offline import SILENCE, private_environment

Start = Callable[..., contextlib.AbstractContextManager[Any]]


def test_temporary_files_go_with_the_process_and_orphans_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (*SILENCE, "GRADIO_TEMP_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")
    with private_environment() as alive:
        assert os.environ["GRADIO_TEMP_DIR"].startswith(str(alive))
        assert all(os.environ[name] == value for name, value in SILENCE.items())
        orphan = tmp_path / "ffl-serve-orphan"
        orphan.mkdir()
        (orphan / ".lock").touch()
        tempfile.tempdir = str(tmp_path)
        with private_environment():
            assert not orphan.exists()
            assert alive.exists()
    assert list(tmp_path.iterdir()) == []


def connections(process: int) -> set[str]:
    """-> the far ends, as /proc/net writes them, of all TCP and UDP sockets that the process has."""
    sockets = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            sockets.add(os.readlink(link))
    rows = [
        line.split()
        for table in ("tcp", "tcp6", "udp", "udp6")
        if Path(f"/proc/{process}/net/{table}").exists()
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]
    ]
    found = {row[2].partition(":")[0] for row in rows if f"socket:[{row[9]}]" in sockets}
    assert found, "the server has its port open"
    return found


def test_nothing_is_written_outside_the_temporary_folder_and_telemetry_is_off(
    two_bundles: tuple[Bundle, Bundle], serve_process: Start, tmp_path: Path
) -> None:
    """ONNX Runtime writes and calls home from the import on unless told before it; Gradio,
    Matplotlib and the hub have caches."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in SILENCE and not k.startswith(("XDG_", "GRADIO_", "HF_"))
    }
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    with serve_process(str(two_bundles[0].folder), env=environment) as running:
        assert httpx.get(running.url).status_code == 200
        (path,) = httpx.post(f"{running.url}/gradio_api/upload", files={"files": ("x.png", b"x")}).json()
        assert path.startswith(str(temporary))
        assert connections(running.process.pid) <= {"0100007F", "00000000"}, "to this machine, or listening"
        running.process.terminate()
        assert running.process.wait(60) == 0
    assert list(home.rglob("*")) == []
    assert list(temporary.rglob("*")) == []


def test_it_imports_no_torch_and_gradio_only_for_the_demo(two_bundles: tuple[Bundle, Bundle]) -> None:
    code = """
import sys, time
from serve.app import create_app
from serve.command import parse_arguments
from starlette.testclient import TestClient

with TestClient(create_app(parse_arguments(sys.argv[1:]))) as client:
    while client.get("/v2/health/ready").status_code != 200: time.sleep(0.05)
print(sorted({"torch", "gradio", "scipy.stats", "sklearn", "ray"} & set(sys.modules)))
"""
    for arguments, expected in ((["--no-demo"], "[]"), ([], "['gradio']")):
        command = [
            sys.executable,
            "-c",
            code,
            str(two_bundles[0].folder),
            "--allow-host",
            "testserver",
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=140, check=False)
        assert done.stdout.strip().splitlines()[-1:] == [expected], done.stderr


def test_gradio_is_imported_while_the_bundles_load(two_bundles: tuple[Bundle, Bundle]) -> None:
    """One after the other they would take seconds longer to be ready."""
    code = """
import sys, time
import serve.server.service
from serve.app import create_app
from serve.command import parse_arguments
from starlette.testclient import TestClient

def slow(*arguments, real=serve.server.service.open_model):
    deadline = time.monotonic() + 30
    while "gradio" not in sys.modules and time.monotonic() < deadline: time.sleep(0.02)
    print("gradio" in sys.modules)
    return real(*arguments)

serve.server.service.open_model = slow
with TestClient(create_app(parse_arguments(sys.argv[1:]))) as client:
    while client.get("/v2/health/ready").status_code != 200: time.sleep(0.05)
"""
    command = [sys.executable, "-c", code, str(two_bundles[0].folder), "--allow-host", "testserver"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["True"], done.stderr
