"""What the server adds to the model: /v2 under concurrent clients against the bare session at its best batch.

    python -m benchmarks.serve_load BUNDLE [--variant int8] [--images 1] [--clients 32] [--repeats 3]
                                    [--against 'env -C OTHER_CHECKOUT python -m serve.command']

Paired: session and server are measured in turn, so that a busy machine disturbs both; with --against another
server too, started by that command. Server, clients and session share the same cores. The clients are one
process of this script that speaks HTTP over raw asyncio streams: a heavier client would measure itself.
Prints a JSON line for each server, and one of the ratios of the two. On a busy machine believe the processor
time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ffl_deploy.bundle import Bundle, load_bundle
from serve.server.settings import ModelSpec

T = TypeVar("T")
OWN = (sys.executable, "-m", "serve.command")
BATCHES = (1, 8, 16, 32, 64)


def session_rate(bundle: Bundle, variant: str | None, batch: int, seconds: float) -> float:
    """-> images per second of the bare session at `batch`, in one thread of calls."""
    session = bundle.session(variant)
    images = _noise(bundle, batch)
    session.run(images)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        session.run(images)
        count += batch
    return count / (time.perf_counter() - began)


def content_length(head: bytes) -> int:
    """-> bytes of the body behind an answer's head; `inference-header-content-length` is another header."""
    start = head.index(b"\r\ncontent-length: ") + 18
    return int(head[start : head.index(b"\r", start)])


async def _client(port: int, request: bytes, until: float, latencies: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        began = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        await reader.readexactly(content_length(head))
        latencies.append(time.perf_counter() - began)
    writer.close()


def server_rate(
    port: int, request: bytes, images: int, clients: int, seconds: float
) -> tuple[float, np.ndarray]:
    """-> (images per second, latencies in seconds) of closed-loop clients,
    each with one request at a time."""

    async def run() -> tuple[float, np.ndarray]:
        latencies: list[float] = []
        began = time.perf_counter()
        await asyncio.gather(*[_client(port, request, began + seconds, latencies) for _ in range(clients)])
        return len(latencies) * images / (time.perf_counter() - began), np.array(latencies)

    return run_clients(run())


def run_clients(clients: Coroutine[Any, Any, T]) -> T:
    """-> what they give, in the cheapest event loop there is: they take from the server's cores."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(clients)
    return uvloop.run(clients)


def infer_request(bundle: Bundle, model: str, images: int) -> bytes:
    """-> a whole HTTP request with binary tensors, as tritonclient sends it."""
    pixels = _noise(bundle, images)
    parameters = {"binary_data_size": pixels.nbytes}
    tensor = {"name": "images", "shape": list(pixels.shape), "datatype": "UINT8", "parameters": parameters}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    body = header + pixels.tobytes()
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1",
        "Host: 127.0.0.1",
        f"Inference-Header-Content-Length: {len(header)}",
        f"Content-Length: {len(body)}",
        "\r\n",
    ]
    return "\r\n".join(lines).encode() + body


def _noise(bundle: Bundle, count: int) -> np.ndarray:
    size = bundle.preprocessing
    return np.random.default_rng(0).integers(0, 256, (count, size.height, size.width, 3), dtype=np.uint8)


def start_server(
    folder: str, variant: str | None, max_batch: int, command: Sequence[str] = OWN
) -> tuple[subprocess.Popen[bytes], int]:
    """-> (process, port), ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--no-demo", "--port", str(port), "--max-batch", str(max_batch)]
    flags += ["--variant", variant] if variant else []
    process = subprocess.Popen([*command, str(Path(folder).resolve()), *flags])
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready")
        except OSError:
            if process.poll() is not None:
                sys.exit("the server did not start")
            time.sleep(0.05)
        else:
            return process, port


def processor_seconds(process: subprocess.Popen[bytes]) -> float:
    """-> what all threads of a running process have taken, as Linux counts it."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Turn(NamedTuple):
    """One measurement of the session and a server. bare, served: images a second; cost: processor time that
    the server takes for an image, in ms; latencies: seconds."""

    bare: float
    served: float
    cost: float
    latencies: np.ndarray


def described(turns: Sequence[Turn]) -> dict[str, float]:
    """-> the medians of a server's turns, and the latencies of all of them."""
    times = np.concatenate([turn.latencies for turn in turns]) * 1000
    return {
        "session_images_per_second": round(statistics.median(turn.bare for turn in turns)),
        "served_images_per_second": round(statistics.median(turn.served for turn in turns)),
        "share": round(statistics.median(turn.served / turn.bare for turn in turns), 3),
        "processor_ms_per_image": round(statistics.median(turn.cost for turn in turns), 3),
        "p50_ms": round(float(np.percentile(times, 50)), 1),
        "p99_ms": round(float(np.percentile(times, 99)), 1),
        "max_ms": round(float(times.max()), 1),
    }


def compared(turns: Sequence[Turn], others: Sequence[Turn]) -> dict[str, float]:
    """-> the medians of what turn by turn is n times the other server's."""
    pairs = list(zip(turns, others, strict=True))
    return {
        "times_served": round(statistics.median(one.served / other.served for one, other in pairs), 3),
        "times_processor_ms": round(statistics.median(one.cost / other.cost for one, other in pairs), 3),
    }


def load_parser(description: str | None) -> argparse.ArgumentParser:
    """-> what every benchmark of a server under load is told: the bundle, the requests, the clients."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--variant")
    parser.add_argument("--images", type=int, default=1, help="of one request")
    parser.add_argument("--clients", type=int, default=32, help="that each have one request at a time")
    parser.add_argument("--max-batch", type=int, default=32)
    return parser


def main() -> None:
    parser = load_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", metavar="COMMAND", help="how another checkout's server is started")
    given = parser.parse_args()
    bundle = load_bundle(given.bundle)
    name = ModelSpec.parse(given.bundle).name
    request = infer_request(bundle, name, given.images)
    best = max(BATCHES, key=lambda batch: session_rate(bundle, given.variant, batch, given.seconds / 3))
    commands = [OWN, *([shlex.split(given.against)] if given.against else [])]
    with contextlib.ExitStack() as stack:
        servers = []
        for command in commands:
            process, port = start_server(given.bundle, given.variant, given.max_batch, command)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            servers.append((process, port))
            server_rate(port, request, given.images, given.clients, 1.0)
        turns: list[list[Turn]] = [[] for _ in servers]
        for repeat in range(given.repeats):
            bare = session_rate(bundle, given.variant, best, given.seconds)
            for number in range(len(servers))[:: 1 if repeat % 2 else -1]:
                process, port = servers[number]
                before = processor_seconds(process)
                served, times = server_rate(port, request, given.images, given.clients, given.seconds)
                cost = (processor_seconds(process) - before) * 1000 / (len(times) * given.images)
                turns[number].append(Turn(bare, served, cost, times))
    head = {"bundle": name, "variant": given.variant or "fp32", "images_per_request": given.images}
    head |= {"clients": given.clients, "best_batch": best}
    for command, of_server in zip(commands, turns, strict=True):
        print(json.dumps({"server": shlex.join(command)} | head | described(of_server)))
    if given.against:
        print(json.dumps(compared(turns[0], turns[1])))


if __name__ == "__main__":
    main()
