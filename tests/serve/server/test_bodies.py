"""Bodies that are too large, too slow, too many or nested too deeply are refused before they are held."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import weakref
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from ffl_deploy.bundle import Bundle
from serve.server import compression
from serve.server.limits import PIECE, Bodies
from serve.server.settings import Limits, ModelSpec, Settings

Start = Callable[..., contextlib.AbstractContextManager[Any]]


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/v2/models/fused/infer", 20_000),
        ("/gradio_api/call/classify", 5_000),
        ("/gradio_api/upload", 50_000),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_its_limit_is_413_announced_or_not(
    demo: Any, path: str, limit: int, chunked: bool
) -> None:
    """Bad input 33. Chunked bodies have no length to look at, and FastAPI would turn the error into a 400."""
    form = {"content-type": "multipart/form-data; boundary=b"} if path.endswith("upload") else {}
    # A well-formed start: about anything else Gradio may complain before the rest has come.
    start = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n' if form else b""
    content: Any = (
        iter([start, *[b"x" * 1000] * (limit // 1000 + 1)]) if chunked else start + b"x" * (limit + 1)
    )
    response = httpx.post(demo.url + path, content=content, headers=form)
    assert response.status_code == 413
    assert str(limit) in response.json()["error"]


def test_deeply_nested_json_is_refused(demo: Any) -> None:
    response = httpx.post(f"{demo.url}/gradio_api/call/classify", content=b"[" * 4_900)
    assert response.status_code == 400


def test_a_body_that_does_not_arrive_is_408(two_bundles: tuple[Bundle, Bundle], start_server: Start) -> None:
    limits = Limits(body_pause_seconds=0.2)
    with start_server(
        Settings((ModelSpec("fused", two_bundles[0].folder),), demo=False, limits=limits)
    ) as running:
        host, port = running.address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(
                b"POST /v2/models/fused/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"
            )
            assert b" 408 " in connection.recv(4096)


def test_a_compressed_body_is_refused_before_it_can_expand(demo: Any) -> None:
    response = httpx.post(
        f"{demo.url}/v2/models/fused/infer", content=b"x", headers={"content-encoding": "br"}
    )
    assert response.status_code == 415


def test_others_are_answered_while_a_body_is_unpacked() -> None:
    """256 kB of zeros unpacked for a quarter of a second, in which nobody else had a turn."""
    pieces, turns = 40, 0
    packed = zlib.compress(bytes(pieces * compression.PIECE))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": packed, "more_body": False}

    async def send(message: Any) -> None:
        pass

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def main() -> None:
        other = asyncio.create_task(others())
        scope = {"type": "http", "path": "/v2", "headers": [(b"content-encoding", b"deflate")]}
        await compression.Inflate(reading, "/v2")(scope, receive, send)
        other.cancel()

    asyncio.run(main())
    assert turns >= pieces - 1


def test_many_large_bodies_at_once_are_503_instead_of_memory() -> None:
    release = asyncio.Event()
    statuses: list[int] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def request(bodies: Any) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"x" * 40, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await bodies({"type": "http", "path": "/", "headers": [(b"content-length", b"40")]}, receive, send)

    async def main() -> None:
        bodies = Bodies(application, Limits(bytes_in_flight=100), lambda path: 50)
        tasks = [asyncio.create_task(request(bodies)) for _ in range(5)]
        # turns of the event loop, not seconds: nothing here waits for anything outside it
        for _ in range(100):
            await asyncio.sleep(0)
        assert statuses == [503] * 3
        release.set()
        await asyncio.gather(*tasks)
        await request(bodies)
        assert statuses == [503] * 3 + [200] * 3

    asyncio.run(main())


def test_one_address_never_holds_all_of_the_room() -> None:
    """Sixteen bodies of one client that never ended kept everybody else out for ten minutes."""
    answered: list[str] = []
    release = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def request(bodies: Any, address: str) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"x" * 20, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answered.append(f"{address} {message['status']}")

        scope = {"type": "http", "path": "/", "headers": [], "client": (address, 1)}
        await bodies(scope, receive, send)

    async def main() -> None:
        bodies = Bodies(application, Limits(bytes_in_flight=100, share_of_address=0.5), lambda path: 50)
        tasks = [asyncio.create_task(request(bodies, name)) for name in "aaaabb"]
        for _ in range(100):
            await asyncio.sleep(0)
        assert answered == ["a 503"] * 2
        release.set()
        await asyncio.gather(*tasks)
        assert sorted(answered) == ["a 200"] * 2 + ["a 503"] * 2 + ["b 200"] * 2
        await request(bodies, "a")
        assert answered[-1] == "a 200"

    asyncio.run(main())


def test_a_byte_now_and_then_is_no_progress() -> None:
    """Nothing here waits: the loop's clock is moved on by every piece."""
    statuses: list[int] = []
    now = 0.0

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    def body(piece: bytes, seconds: float, count: int) -> Any:
        left = count

        async def receive() -> dict[str, Any]:
            nonlocal now, left
            now, left = now + seconds, left - 1
            await asyncio.sleep(0)
            return {"type": "http.request", "body": piece, "more_body": left > 0}

        return receive

    async def main() -> None:
        asyncio.get_running_loop().time = lambda: now  # type: ignore[method-assign]
        bodies = Bodies(application, Limits(), lambda path: 1 << 30)
        scope = {"type": "http", "path": "/", "headers": []}
        await bodies(scope, body(b"x", 15, 60), send)
        await bodies(scope, body(b"x" * PIECE, 15, 20), send)
        assert statuses == [408, 200]

    asyncio.run(main())


def test_announced_bodies_that_do_not_arrive_keep_nobody_out() -> None:
    statuses: list[int] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        statuses.append(message["status"])

    async def never() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError

    async def arrived() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 40, "more_body": False}

    async def main() -> None:
        bodies = Bodies(application, Limits(bytes_in_flight=100), lambda path: 90)
        scope = {"type": "http", "path": "/", "headers": [(b"content-length", b"90")]}
        waiting = [asyncio.create_task(bodies(scope, never, send)) for _ in range(3)]
        await asyncio.sleep(0)
        await bodies({**scope, "headers": [(b"content-length", b"40")]}, arrived, send)
        assert statuses == [200]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(main())


class Client:
    """A body that comes piece by piece, as the test says, and what it is answered."""

    def __init__(self, bodies: Bodies, address: str = "a") -> None:
        self.status: int | None = None
        self._pieces: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {"type": "http", "path": "/", "headers": [], "client": (address, 1)}
        self.task = asyncio.create_task(bodies(scope, self._pieces.get, self._send))

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)

    async def sends(self, size: int, last: bool = False) -> Client:
        self._pieces.put_nowait({"type": "http.request", "body": bytes(size), "more_body": not last})
        for _ in range(20):
            await asyncio.sleep(0)
        return self


async def reading(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_bodies_that_wait_for_their_rest_give_way_the_longest_first() -> None:
    """Eight bodies of 32 MiB without their last bytes kept out all others of their address, of 10 kB too."""
    now = 0.0

    async def main() -> None:
        nonlocal now
        asyncio.get_running_loop().time = lambda: now  # type: ignore[method-assign]
        limits = Limits(bytes_in_flight=400, share_of_address=0.25)
        bodies = Bodies(reading, limits, lambda path: 200)
        first, other = await Client(bodies).sends(40), await Client(bodies, "b").sends(90)
        # both have just sent something
        assert (await Client(bodies).sends(70, last=True)).status == 503
        now = 0.5
        second = await Client(bodies).sends(40)
        now = 2.0
        await first.sends(1)  # too little to be progress
        assert (await Client(bodies).sends(20, last=True)).status == 200
        assert (first.status, second.status, other.status) == (503, None, None)
        # one that would not find room even so ends nobody
        assert (await Client(bodies).sends(150, last=True)).status == 503
        assert (await second.sends(10, last=True)).status == 200
        assert (await other.sends(10, last=True)).status == 200
        # all of it was given back
        assert (await Client(bodies).sends(100, last=True)).status == 200
        await asyncio.gather(first.task, second.task, other.task)

    asyncio.run(main())


@pytest.mark.parametrize("status", [503, 408, 413])
def test_a_refused_body_is_not_kept(status: int) -> None:
    """Those that were refused as too many were kept for ever, 32 MiB each: by the one exception that all of
    them were refused with."""

    class Held:
        pass

    held: list[weakref.ref[Held]] = []
    now = 0.0

    async def application(scope: Any, receive: Any, send: Any) -> None:
        body = Held()
        held.append(weakref.ref(body))
        await reading(scope, receive, send)

    async def main() -> None:
        nonlocal now
        asyncio.get_running_loop().time = lambda: now  # type: ignore[method-assign]
        limits = Limits(bytes_in_flight=100, body_pause_seconds=0.0 if status == 408 else 20.0)
        bodies = Bodies(application, limits, lambda path: 50 if status == 413 else 200)
        for _ in range(2):
            client = await Client(bodies).sends(20 if status == 408 else 101)
            await client.task
            assert client.status == status
        del client

    gc.collect()
    gc.disable()
    try:
        asyncio.run(main())
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()
