"""How long answers take at half, four fifths and nearly all of what the server can do: an open loop.

    python -m benchmarks.serve_latency BUNDLE [--variant int8] [--images 1] [--shares 0.5 0.8 0.95]
                                       [--seconds 20]

Before each share closed-loop clients measure the capacity, which drifts with what else the machine does. Then
requests come at random moments (a Poisson process, from a seed) at that share of it, whether earlier ones
have been answered or not, and a latency counts from the moment at which its request was due: a server that
stalls is not spared the requests that would have come meanwhile (no "coordinated omission"). Prints one JSON
line a share, with how late the generator itself was, which is part of the latencies and has to be small
beside them. Server and clients share the cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.serve_load import (
    content_length,
    infer_request,
    load_parser,
    run_clients,
    server_rate,
    start_server,
)
from ffl_deploy.bundle import load_bundle
from serve.server.settings import ModelSpec

SHARES = (0.5, 0.8, 0.95)
PERCENTILES = (50, 90, 95, 99, 99.9)
MOST_CONNECTIONS = 900  # below the server's own limit; a request that finds none free waits, and that counts
PATIENCE_SECONDS = 30.0
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Answers(NamedTuple):
    """latency, late: seconds from the moment at which a request was due to its answer, and to its being sent;
    lost: answers that were none, or not 200. took: seconds from the first request to the last answer."""

    latency: np.ndarray
    late: np.ndarray
    lost: list[str]
    took: float


def due_times(rate: float, seconds: float, seed: int = 0) -> np.ndarray:
    """-> float64 [n]: when each request of a Poisson process with `rate` a second is due, from 0 on."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, size=int(rate * seconds * 1.5) + 50))
    return times[times < seconds]


async def open_loop(port: int, request: bytes, due: Sequence[float] | np.ndarray) -> Answers:
    """Send a request at each of the moments `due`, on a connection that is free or a new one."""
    loop = asyncio.get_running_loop()
    idle: deque[Connection] = deque()
    room = asyncio.Semaphore(MOST_CONNECTIONS)
    latency, late, lost = np.full(len(due), np.nan), np.full(len(due), np.nan), list[str]()

    async def ask(number: int, moment: float) -> None:
        writer: asyncio.StreamWriter | None = None
        try:
            async with room, asyncio.timeout(PATIENCE_SECONDS):
                reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
                late[number] = loop.time() - moment
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(content_length(head))
                idle.append((reader, writer))
            if head.startswith(b"HTTP/1.1 200"):
                latency[number] = loop.time() - moment
            else:
                lost.append(head[9:12].decode())
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            lost.append(type(error).__name__)
            if writer is not None:
                writer.close()

    began = loop.time() + 0.1
    async with asyncio.TaskGroup() as tasks:
        for number, moment in enumerate(due):
            if (left := began + moment - loop.time()) > 0:
                await asyncio.sleep(left)
            tasks.create_task(ask(number, began + moment))
    took = loop.time() - began
    for _, writer in idle:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return Answers(latency[~np.isnan(latency)], late[~np.isnan(late)], lost, took)


def described(share: float, capacity: float, images: int, answers: Answers) -> dict[str, object]:
    """-> the line of one share. capacity: images a second."""
    milliseconds = answers.latency * 1000
    return {
        "capacity_images_per_second": round(capacity, 1),
        "share": share,
        "due_per_second": round(share * capacity / images, 1),
        "answered": len(milliseconds),
        "lost": len(answers.lost),
        "reasons": sorted(set(answers.lost)),
        "images_per_second": round(len(milliseconds) * images / answers.took, 1),
        **{f"p{percent:g}_ms": _percentile(milliseconds, percent) for percent in PERCENTILES},
        "max_ms": _percentile(milliseconds, 100),
        "late_p99_ms": _percentile(answers.late * 1000, 99),
    }


def _percentile(milliseconds: np.ndarray, percent: float) -> float | None:
    return round(float(np.percentile(milliseconds, percent)), 1) if len(milliseconds) else None


def main() -> None:
    parser = load_parser(__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each share")
    given = parser.parse_args()
    bundle, name = load_bundle(given.bundle), ModelSpec.parse(given.bundle).name
    request = infer_request(bundle, name, given.images)
    process, port = start_server(given.bundle, given.variant, given.max_batch)
    try:
        server_rate(port, request, given.images, given.clients, 1.0)
        head = {"bundle": name, "variant": given.variant or "fp32", "images_per_request": given.images}
        print(json.dumps(head), flush=True)
        for share in given.shares:
            rates = [server_rate(port, request, given.images, given.clients, 2.0)[0] for _ in range(3)]
            capacity = statistics.median(rates)
            due = due_times(share * capacity / given.images, given.seconds)
            answers = run_clients(open_loop(port, request, due))
            print(json.dumps(described(share, capacity, given.images, answers)), flush=True)
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
