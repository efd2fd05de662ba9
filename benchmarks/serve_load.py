"""What the server adds to the model: /v2 under concurrent clients against the bare session at its best batch.

    python benchmarks/serve_load.py BUNDLE [--variant int8] [--images 1] [--clients 32] [--repeats 3]

Paired: session and server are measured in turn, so that a busy machine disturbs both. Server, clients and
session share the same cores. The clients are one process of this script that speaks HTTP over raw asyncio
streams: a heavier client would measure itself. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

from ffl_deploy.bundle import Bundle, load_bundle
from serve.server.settings import ModelSpec

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

    try:
        import uvloop
    except ImportError:
        return asyncio.run(run())
    return uvloop.run(run())


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


def start_server(folder: str, variant: str | None, max_batch: int) -> tuple[subprocess.Popen[bytes], int]:
    """-> (process, port), ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "serve.command",
        folder,
        "--no-demo",
        "--port",
        str(port),
        "--max-batch",
        str(max_batch),
    ]
    process = subprocess.Popen(command + (["--variant", variant] if variant else []))
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready")
        except OSError:
            if process.poll() is not None:
                sys.exit("the server did not start")
            time.sleep(0.05)
        else:
            return process, port


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--variant")
    parser.add_argument("--images", type=int, default=1, help="of one request")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    bundle = load_bundle(given.bundle)
    name = ModelSpec.parse(given.bundle).name
    request = infer_request(bundle, name, given.images)
    best = max(BATCHES, key=lambda batch: session_rate(bundle, given.variant, batch, given.seconds / 3))
    process, port = start_server(str(Path(given.bundle)), given.variant, given.max_batch)
    try:
        server_rate(port, request, given.images, given.clients, 1.0)
        pairs, latencies = [], []
        for _ in range(given.repeats):
            bare = session_rate(bundle, given.variant, best, given.seconds)
            served, times = server_rate(port, request, given.images, given.clients, given.seconds)
            pairs.append((bare, served))
            latencies.append(times)
    finally:
        process.terminate()
        process.wait()
    times = np.concatenate(latencies) * 1000
    result = {
        "bundle": name,
        "variant": given.variant or "fp32",
        "images_per_request": given.images,
        "clients": given.clients,
        "best_batch": best,
        "session_images_per_second": round(statistics.median(bare for bare, _ in pairs)),
        "served_images_per_second": round(statistics.median(served for _, served in pairs)),
        "share": round(statistics.median(served / bare for bare, served in pairs), 3),
        "p50_ms": round(float(np.percentile(times, 50)), 1),
        "p99_ms": round(float(np.percentile(times, 99)), 1),
        "max_ms": round(float(times.max()), 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
