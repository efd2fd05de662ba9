"""What of Gradio a client may reach, and what its JSON may point at.

Gradio has some forty routes, among them proxies that fetch a URL for the client (`/file=http...`, `/proxy=`),
a code editor and a recorder. The demo needs those of `ROUTES`. Its JSON may name files by path or URL; the
only ones a client may name are its uploads, so that nothing else on this machine or any other is read for it.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.demo.aside import Aside
from serve.demo.pieces import Pieces
from serve.server.full_disk import full_disk
from serve.server.responses import Refused
from serve.server.service import Service
from serve.server.settings import Limits

API = "/gradio_api"
UPLOAD = f"{API}/upload"
FILE = f"{API}/file="
ROUTES = re.compile(
    r"/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(/\d+)?|(assets|static|svelte)/.+)?|"
    rf"{API}/(info|openapi\.json|app_id|startup-events|queue/(join|data|status)|call/.+|run/[^/]+|cancel|reset|heartbeat/[^/]+|"
    r"upload|upload_progress|theme\.css|file=.+|custom_component/.+)/?"
)
# as the page makes them; Gradio remembers whatever is sent
UPLOAD_ID = re.compile(rb"upload_id=[A-Za-z0-9]{1,40}")
LONGEST_PATH = 4096
ENTRY_BYTES = 4096  # what a file or folder takes beside its blocks
MEASURE_SECONDS, MEASURE_SHARE = 0.5, 10  # the upload folder is measured for at most a tenth of the time


def largest_demo_body(path: str, limits: Limits) -> int:
    """-> the largest body that may be sent to `path`, in bytes."""
    return limits.upload_bytes if path.rstrip("/") == UPLOAD else limits.demo_json_bytes


class DemoGuard:
    """What the demo is mounted behind: known routes only, files of the upload folder only,
    room for uploads only as agreed."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.limits = app, service.settings.limits
        prefix = re.escape(service.settings.root_path + FILE)
        self._own_url = re.compile(rf"(https?://[^/]+)?{prefix}")
        self._pieces = Pieces(upload_folder)
        self._aside = Aside(app)
        service.endings.append(self._aside.close)
        self._kept_bytes, self._measure_at = 0, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        try:
            if not ROUTES.fullmatch(path):
                raise Refused(404, "the demo has no such route")
            if path.rstrip("/") in (UPLOAD, f"{UPLOAD}_progress"):
                query = scope.get("query_string", b"")
                if query and not UPLOAD_ID.fullmatch(query):
                    raise Refused(400, "an upload has no such parameters")
            if path.startswith(FILE) and not _in_upload_folder(path.removeprefix(FILE)):
                raise Refused(403, "only files of this demo can be read")
            if scope["method"] == "POST":
                if path.rstrip("/") == UPLOAD:
                    await self._check_room(scope)
                    return await self._upload(scope, receive, send)
                receive = await _checked_json(receive, self._own_url)
        except Refused as refused:
            return await refused(scope, receive, send)
        return await self.app(scope, receive, _with_page_headers(send))

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Without what it leaves where it breaks off."""
        upload, failed = self._pieces.begin(), False

        async def held_send(message: Message) -> None:
            nonlocal failed  # Gradio's 500 comes before the error that says why
            failed = failed or (message["type"] == "http.response.start" and message["status"] == 500)
            if not failed:
                await send(message)

        try:
            await self._aside(scope, receive, _with_page_headers(held_send))
        except ClientDisconnect:
            pass  # no fault of ours, and nobody is there to hear of it
        except OSError as error:
            if (refused := full_disk(error)) is None:
                raise
            raise refused from None
        finally:
            self._pieces.end(upload)

    async def _check_room(self, scope: Scope) -> None:
        """Uploads are kept for an hour; a flood of them meets this bound before it fills the disk.

        The folder is measured now and then, and in between what is announced counts: walking thousands of
        files for every upload made a flood of small ones a queue of walks.
        """
        announced = Headers(scope=scope).get("content-length", "")
        size = int(announced) if announced.isdecimal() else self.limits.upload_bytes
        began = time.monotonic()
        if began >= self._measure_at:
            self._measure_at, before = math.inf, self._kept_bytes  # one walk at a time
            try:
                measured = await asyncio.to_thread(_folder_bytes, upload_folder().parent)
                self._kept_bytes += measured - before
            finally:
                now = time.monotonic()
                self._measure_at = now + MEASURE_SECONDS + MEASURE_SHARE * (now - began)
        if self._kept_bytes + size > self.limits.upload_folder_bytes:
            raise Refused(503, "the server holds too many uploads; try again later", {"retry-after": "600"})
        self._kept_bytes += size


def upload_folder() -> Path:
    """-> where Gradio keeps uploads (serve/server/offline.py sets it)."""
    return Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir(), "gradio"))


def _in_upload_folder(path: str) -> bool:
    """By the text alone: to resolve what a client sent, half a million folders deep, took 35 s. Nothing in
    the folder is a link, since names and files in it are Gradio's and ours."""
    folder = os.path.abspath(upload_folder())
    return (
        len(path) <= LONGEST_PATH
        and "\0" not in path
        and os.path.normpath(path) == path
        and path.startswith((folder + os.sep, os.path.realpath(folder) + os.sep))
    )


def _folder_bytes(folder: Path) -> int:
    """-> what the folder takes of the disk: whole blocks, and an entry for each file and folder."""
    total = 0
    for parent, folders, names in os.walk(folder):
        total += ENTRY_BYTES * (len(folders) + len(names))
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:  # pruned meanwhile
                continue
    return total


async def _checked_json(receive: Receive, own_url: re.Pattern[str]) -> Receive:
    """Read a JSON body (its size is bounded already), check what it points at;
    -> a receive that gives it again."""
    pieces: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return receive
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"".join(pieces)
    try:
        _check_references(msgspec.json.decode(body) if body else None, own_url)
    except (msgspec.DecodeError, RecursionError):
        raise Refused(400, "the body is not valid JSON") from None
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _check_references(value: Any, own_url: re.Pattern[str]) -> None:
    """Refuse a path outside the upload folder and any URL but that of an upload; `data:` counts as a URL."""
    if isinstance(value, list):
        for item in value:
            _check_references(item, own_url)
    elif isinstance(value, dict):
        path, url = value.get("path"), value.get("url")
        if isinstance(path, str) and path and not _in_upload_folder(path):
            raise Refused(403, "only files that were uploaded here can be named; see the route upload")
        if isinstance(url, str) and url and not own_url.match(url):
            raise Refused(403, "URLs are not read; upload the file first")
        for item in value.values():
            _check_references(item, own_url)


# The browser itself then refuses any request off the machine. Gradio's page needs inline scripts,
# workers and data images.
CONTENT_SECURITY_POLICY = (
    "default-src 'self' blob: data: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; "
    "base-uri 'self'; form-action 'self'; object-src 'none'"
)
PAGE_HEADERS = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
]


def _with_page_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *PAGE_HEADERS]
        await send(message)

    return with_headers
