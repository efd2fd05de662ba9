"""What refused requests brought is not kept: by no exception, and by malloc only for some seconds."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from ffl_deploy.bundle import Bundle
from serve.server import memory
from serve.server.rpc import messages
from serve.server.settings import ModelSpec, Settings

LARGE = 1_000_000


@pytest.fixture(scope="module")
def running(two_bundles: tuple[Bundle, Bundle], start_server: Any) -> Iterator[Any]:
    models = (ModelSpec("fused", two_bundles[0].folder),)
    with start_server(Settings(models, demo=False, grpc_port=0)) as server:
        yield server


def holders() -> list[str]:
    """-> the functions of the server whose frames live on with something large: those that an exception came
    through, which somebody keeps."""

    def large(value: object) -> bool:
        return isinstance(value, bytes | memoryview) and len(value) >= LARGE

    frames = [one for one in gc.get_objects() if isinstance(one, FrameType)]
    ours = [one for one in frames if "/serve/server/" in one.f_code.co_filename]
    return [one.f_code.co_qualname for one in ours if any(map(large, list(one.f_locals.values())))]


def nothing_is_held() -> bool:
    """-> whether that is so within a minute, without the help of the collector: a call's last steps may come
    after its answer."""
    deadline = time.monotonic() + 60
    while found := holders():
        if time.monotonic() > deadline:
            print(found)
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("fault", ["fields", "model", "stream"])
def test_a_refused_call_leaves_nothing(running: Any, fault: str) -> None:
    """gRPC kept the exception of `context.abort`, and so each refused message of up to 16 MiB, for ever."""
    asked = messages.message("ModelInferRequest")(model_name="nobody", raw_input_contents=[bytes(LARGE)])
    body = asked.SerializeToString() if fault == "model" else bytes([0x2A, 0]) * LARGE
    with grpc.insecure_channel(f"127.0.0.1:{running.service.grpc_port}") as channel:
        unary = channel.unary_unary(f"/{messages.INFERENCE}/ModelInfer")
        stream = channel.stream_stream(f"/{messages.INFERENCE}/ModelStreamInfer")
        for _ in range(3):
            call = partial(next, stream(iter([body]))) if fault == "stream" else partial(unary, body)
            with pytest.raises(grpc.RpcError) as caught:
                call()
            expected = "NOT_FOUND" if fault == "model" else "INVALID_ARGUMENT"
            assert caught.value.code().name == expected
            assert caught.value.details()
    del caught
    assert nothing_is_held()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("refused", [True, False], ids=["refused", "answered"])
def test_a_call_leaves_no_message_with_grpc(running: Any, refused: bool) -> None:
    """gRPC's iterator of a call's messages is a circle with its generator, which held the last one: a server
    under attack grew by 14 MiB a call until the interpreter happened to look for circles."""
    images = np.zeros((64, 32, 32, 3), np.uint8)
    asked = messages.message("ModelInferRequest")(model_name="fused", raw_input_contents=[images.tobytes()])
    asked.inputs.add(name="images", datatype="UINT8", shape=images.shape)
    body = bytes([0x2A, 0]) * (LARGE // 2) if refused else asked.SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{running.service.grpc_port}") as channel:
        call = channel.unary_unary(f"/{messages.INFERENCE}/ModelInfer")

        def once() -> None:
            with pytest.raises(grpc.RpcError) if refused else contextlib.nullcontext():
                call(body, timeout=60)

        once()  # what is made once is there
        tracemalloc.start()
        try:
            for _ in range(20):
                once()
            deadline = time.monotonic() + 60
            while (held := tracemalloc.get_traced_memory()[0]) > 3 * len(
                body
            ) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            tracemalloc.stop()
    assert held <= 3 * len(body)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("fault", ["json", "image", "values"])
def test_a_refused_request_leaves_nothing(running: Any, fault: str, photo: Callable[..., bytes]) -> None:
    """The future of a decoder's thread held its exception, which held the frame of the request."""
    image = photo(1, "PNG", size=(1200, 1000))[: LARGE * 2]
    cut = base64.b64encode(image[: len(image) // 2]).decode()
    data = {
        "json": b"{" + b" " * LARGE + b"]",
        "image": b'{"inputs":[{"name":"encoded","datatype":"BYTES","shape":[2],"data":["%b","%b"]}]}'
        % (cut.encode(), cut.encode()),
        "values": b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,32,32,3],"data":[1]}],"x":"%b"}'
        % (b"x" * LARGE),
    }[fault]
    assert len(data) >= LARGE
    for _ in range(3):
        assert httpx.post(f"{running.url}/v2/models/fused/infer", content=data).status_code == 400
    assert nothing_is_held()


def gave_back(sizes: list[int], in_use: list[int] | None = None) -> list[int]:
    """-> the looks at which memory was given back, of a process that has these sizes at one look after the
    other, of which so much is in use (100, where nothing else is said)."""
    looks, trims, now = iter(range(len(sizes))), list[int](), [0]
    resident = {"now": sizes[0]}

    def trim() -> None:
        trims.append(now[0])
        resident["now"] = min(resident["now"], in_use[now[0]] if in_use else 100)

    async def look(seconds: float) -> None:
        number = next(looks, None)
        if number is None:
            raise asyncio.CancelledError
        now[0], resident["now"] = number, sizes[number]

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(memory.give_back(trim, lambda: resident["now"], look))
    return trims


def test_memory_is_given_back_where_the_process_has_grown() -> None:
    assert gave_back([120, 100, 100, 100]) == [0]  # what starting has taken
    assert gave_back([100, 100, 100, 300, 100, 100, 100]) == [0, 3]
    assert gave_back([100, 104, 104, 104]) == [0]
    # what is in use cannot be: it is tried again, less and less often
    sizes = [100, *[200] * 40]
    assert gave_back(sizes, sizes) == [0, 1, 5, 13, 29]
    # and at once where it grows further
    assert gave_back([100, 200, 300, 400], [100, 200, 300, 400]) == [0, 1, 2, 3]
    # what was in use and is free later is found, without that anything grows
    assert gave_back([100, *[200] * 5, 100, 100], [100, 200, 200, 200, *[100] * 4])[-1] == 5


def test_the_memory_of_this_process_is_found_and_trimmed() -> None:
    assert memory.resident() > 10 << 20
    trim = memory.trimmer()
    if sys.platform == "linux" and trim is not None:
        trim()
    asyncio.run(asyncio.wait_for(memory.give_back(None), 5))  # another malloc: nothing to do
