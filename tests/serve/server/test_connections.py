"""What comes before a request: headers without end, and connections that send nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from serve.server.connections import PIPELINED, bounded
from serve.server.settings import Limits

LIMITS = Limits(connections=12, silent_connections=5, header_bytes=4096, header_seconds=1.0)


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of the body's bytes; a request for /slow is answered after a while."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(1.5)
    text = str(size).encode()
    headers = [(b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(
            application,
            http=bounded(LIMITS),
            limit_concurrency=LIMITS.connections,
            lifespan="off",
            log_level="critical",
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def connect(port: int) -> Iterator[Callable[[], socket.socket]]:
    with contextlib.ExitStack() as stack:

        def opened() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))

        yield opened


def answer(connection: socket.socket) -> bytes:
    """-> everything that comes until the other side closes."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def send_until_refused(connection: socket.socket, piece: bytes, most: int = 1 << 22) -> int:
    """-> bytes that could be sent."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < most:
            sent += connection.send(piece)
    return sent


@pytest.mark.parametrize(
    "begin",
    [
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nx: ",
        b"GET /",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1;",
    ],
    ids=["lines", "one line", "the address", "trailers", "a chunk's extension"],
)
def test_headers_without_end_are_refused(
    begin: bytes, connect: Callable[[], socket.socket], port: int
) -> None:
    connection = connect()
    connection.sendall(begin)
    piece = b"a:b\r\n" * 2000 if begin.endswith(b"\r\n") else b"a" * 10_000
    assert send_until_refused(connection, piece) < 1 << 22
    assert httpx.get(f"http://127.0.0.1:{port}/").text == "0"


def test_long_headers_are_told(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\ncookie: " + b"a" * 4096 + b"\r\n\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 431 ")


def test_what_is_allowed_passes(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(3):
            assert client.get("/", headers={"cookie": "a" * 3000}).text == "0"
            assert client.post("/", content=b"x" * 3_000_000).text == "3000000"
            single_bytes = client.post("/", content=(b"x" for _ in range(20_000)))
            assert single_bytes.text == "20000"


def test_headers_that_do_not_come_end_the_connection(connect: Callable[[], socket.socket]) -> None:
    silent, slow = connect(), connect()
    slow.sendall(b"GET / HTTP/1.1\r\nhost:")
    for connection in (silent, slow):
        assert answer(connection).startswith(b"HTTP/1.1 408 ")


def test_a_kept_connection_has_as_long_for_its_next_request(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    time.sleep(1.5)  # idle is not slow
    connection.sendall(b"GET / HTTP/1.1\r\nhost")
    assert answer(connection).startswith(b"HTTP/1.1 408 ")


def test_silent_connections_turn_away_nobody(connect: Callable[[], socket.socket], port: int) -> None:
    silent = [connect() for _ in range(30)]
    for _ in range(10):
        assert httpx.get(f"http://127.0.0.1:{port}/").text == "0"
    assert answer(silent[0]) == b"", "the first ones make room"


def test_kept_connections_make_room_and_requests_do_not(
    connect: Callable[[], socket.socket], port: int
) -> None:
    at_work = connect()
    at_work.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
    kept = [connect() for _ in range(20)]
    for connection in kept:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            connection.recv(65536)
    assert httpx.get(f"http://127.0.0.1:{port}/").text == "0"
    assert at_work.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_flood_of_pipelined_requests_is_refused(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n" + b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 3000)
    said = answer(connection)
    assert said.count(b"HTTP/1.1 200") <= PIPELINED + 1
