"""The open loop: requests come when they are due, and a stall counts for all that were due meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from benchmarks.serve_latency import Answers, described, due_times, open_loop

REQUEST = b"POST / HTTP/1.1\r\n\r\n"


def measured(due: Sequence[float], respond: Callable[[int], Awaitable[bytes]]) -> tuple[Answers, int]:
    """-> what open_loop found of a server that answers the n-th request with `respond(n)`, and the number of
    connections."""
    requests = connections = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests, connections
        connections += 1
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                requests += 1
                writer.write(await respond(requests))

    async def run() -> Answers:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        async with server:
            return await open_loop(server.sockets[0].getsockname()[1], REQUEST, due)

    return asyncio.run(run()), connections


def answer(status: int = 200) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: 2\r\n\r\nok" % status


def test_a_stall_counts_for_every_request_that_was_due_meanwhile() -> None:
    """Clients that wait for their answers would have sent one."""

    until = list[float]()

    async def respond(number: int) -> bytes:
        until.append(time.monotonic() + 0.6)
        await asyncio.sleep(max(0.0, until[0] - time.monotonic()))
        return answer()

    answers, _ = measured(list(np.arange(50) / 100), respond)
    assert len(answers.latency) == 50
    # one due t seconds after the first is answered no sooner than 0.6 - t after it was due
    assert np.sort(answers.latency)[25] >= 0.3
    assert answers.latency.max() >= 0.59


def test_free_connections_are_taken_again_and_refusals_are_lost() -> None:
    async def respond(number: int) -> bytes:
        return answer(503 if number == 3 else 200)

    answers, connections = measured([0.0, 0.2, 0.4, 0.6], respond)
    assert (len(answers.latency), answers.lost) == (3, ["503"])
    assert 1 <= connections <= 4
    line = described(0.5, 10.0, 2, answers)
    assert line["due_per_second"] == 2.5  # half of ten images a second, two a request
    assert (line["answered"], line["lost"], line["reasons"]) == (3, 1, ["503"])
    assert line["p50_ms"] <= line["p99_ms"] <= line["max_ms"]  # type: ignore[operator]


def test_a_share_of_which_nothing_was_answered_has_a_line_too() -> None:
    async def respond(number: int) -> bytes:
        return answer(503)

    answers, _ = measured([0.0, 0.1], respond)
    line = described(0.95, 10.0, 1, answers)
    assert (line["answered"], line["lost"], line["p99_ms"], line["max_ms"]) == (0, 2, None, None)


def test_a_connection_that_ends_loses_its_request_alone() -> None:
    async def respond(number: int) -> bytes:
        return b"" if number == 2 else answer()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.serve_latency.PATIENCE_SECONDS", 1.0)
        answers, _ = measured([0.0, 0.2, 0.4], respond)
    assert (len(answers.latency), answers.lost) == (2, ["TimeoutError"])


def test_requests_are_due_at_the_rate_that_was_asked_for() -> None:
    due = due_times(1000.0, 20.0)
    assert abs(len(due) - 20_000) < 5 * 20_000**0.5
    assert (np.diff(due) > 0).all()
    assert due[-1] < 20.0
    # a Poisson process: the gaps' deviation is their mean
    assert abs(np.diff(due).std() * 1000 - 1) < 0.05
    assert (due == due_times(1000.0, 20.0)).all()
