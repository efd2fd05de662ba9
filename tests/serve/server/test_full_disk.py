"""A disk that is full while an upload is being kept: 507 with a sentence, and the next upload works."""

from __future__ import annotations

import asyncio
import errno
import gc
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from serve.demo.guard import DemoGuard
from serve.server.settings import Limits


def test_an_upload_that_meets_a_full_disk_says_so_and_gives_its_space_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The piece was unlinked and stayed open, so that every later upload failed too."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    kept: list[OSError] = []
    files: list[int] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        piece = tempfile.NamedTemporaryFile(dir=tmp_path)  # noqa: SIM115
        files.append(piece.fileno())
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            kept.append(error)  # as whoever logs it may
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"Internal Server Error"})
            raise

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    service = SimpleNamespace(settings=SimpleNamespace(limits=Limits(), root_path=""), endings=[])
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/gradio_api/upload",
        "query_string": b"",
        "headers": [],
    }
    asyncio.run(DemoGuard(inner, service)(scope, receive, send))  # type: ignore[arg-type]
    for end in service.endings:
        end()
    assert [message.get("status") for message in sent] == [507, None]
    assert b"disk is full" in sent[1]["body"]
    gc.collect()
    assert kept
    assert list(tmp_path.glob("tmp*")) == [], "the piece is closed, though its error is still known"


def test_photographs_in_a_form_that_meet_one(
    server: Any, photo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    url = f"{server.url}/classify"
    with monkeypatch.context() as patch:
        patch.setattr(tempfile.SpooledTemporaryFile, "write", write)
        response = httpx.post(url, files={"file": photo(1)})
    assert response.status_code == 507
    assert "disk is full" in response.json()["error"]
    assert httpx.post(url, files={"file": photo(1)}).status_code == 200
