"""Requests take turns at the decoders, and one request's files are bounded together."""

from __future__ import annotations

import asyncio
import io
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.images import ImageError
from ffl_deploy.preprocessing import Preprocessing
from serve.server import models
from serve.server.batcher import Overloaded
from serve.server.models import Decoders
from serve.server.settings import Limits


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available_cores", lambda: 1)


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def model_of(size: int) -> Any:
    return SimpleNamespace(bundle=SimpleNamespace(preprocessing=Preprocessing(size, size)))


def test_a_request_with_many_files_does_not_hold_up_one_with_one(one_thread: None) -> None:
    order: list[str] = []

    async def main() -> None:
        decoders = Decoders(Limits())
        begun, go_on = threading.Event(), threading.Event()

        def large(number: int) -> None:
            begun.set()
            go_on.wait(60)
            order.append(f"large {number}")

        many = asyncio.create_task(decoders._run([lambda i=i: large(i) for i in range(5)]))  # type: ignore[misc]
        await asyncio.to_thread(begun.wait, 60)
        small = asyncio.create_task(decoders.run(lambda: order.append("small")))
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(many, small)
        decoders.close()

    asyncio.run(main())
    assert order.index("small") <= 2, "after the one that was being decoded, and at most one more"
    assert len(order) == 6


def test_files_behind_a_bad_one_are_not_decoded(one_thread: None) -> None:
    done: list[int] = []

    def bad() -> None:
        raise ImageError("corrupt", "bad")

    async def main() -> None:
        decoders = Decoders(Limits())
        with pytest.raises(ImageError, match="bad"):
            await decoders._run([lambda: done.append(0), bad, *[lambda: done.append(1)] * 50])
        assert await decoders.run(lambda: 7) == 7
        decoders.close()

    asyncio.run(main())
    assert len(done) < 10


def test_the_pixels_of_a_request_are_bounded_together() -> None:
    async def main() -> None:
        decoders = Decoders(Limits(request_pixels=3000))
        prepared = await decoders.prepare([png(50, 20)] * 3, model_of(8))
        assert prepared.shape == (3, 8, 8, 3)
        assert (prepared == np.array([9, 8, 7])).all()
        with pytest.raises(ImageError, match="of this request have more than") as refused:
            await decoders.prepare([png(50, 20)] * 20, model_of(8))
        assert refused.value.code == "too_large"
        decoders.close()

    asyncio.run(main())


def test_more_files_than_may_wait_are_refused_and_leave_nothing_behind() -> None:
    async def main() -> None:
        decoders = Decoders(Limits(queued_decodes=4))
        for _ in range(3):
            with pytest.raises(Overloaded):
                await decoders.prepare([png(2, 2)] * 5, model_of(8))
            assert (await decoders.prepare([png(2, 2)] * 4, model_of(8))).shape == (4, 8, 8, 3)
        decoders.close()

    asyncio.run(main())


def test_a_client_that_goes_away_frees_its_place(one_thread: None) -> None:
    async def main() -> None:
        decoders = Decoders(Limits(queued_decodes=5))
        begun, go_on = threading.Event(), threading.Event()

        def wait() -> None:
            begun.set()
            go_on.wait(60)

        gone = asyncio.create_task(decoders._run([wait] * 5))
        await asyncio.to_thread(begun.wait, 60)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        other = asyncio.create_task(decoders._run([lambda: 1] * 5))
        go_on.set()
        assert await other == [1] * 5
        decoders.close()

    asyncio.run(main())
