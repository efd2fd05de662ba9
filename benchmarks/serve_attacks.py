"""Good requests while somebody attacks: who loses what.

    python benchmarks/serve_attacks.py BUNDLE [--seconds 60] [--only NAME ...] [--grpc] [--demo]

Starts a server, and for each attack eight clients that ask ten times a second each, a health probe ten times
a second, and the attacker, a process of its own on the same cores. Prints one JSON line an attack: good
requests, how many were lost, p50 and p99 and the slowest, the slowest probe, and the server's memory before,
at its peak and afterwards. What has to hold: none lost, p99 below 1 s, probes below 0.5 s, memory within 10 %
of what it was.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gzip
import io
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ffl_deploy.bundle import load_bundle

CLIENTS, PERIOD = 8, 0.1  # seconds between two requests of one
Attack = Callable[[str, int, int], Iterator[None]]
"""(model, port, gRPC's port) -> a generator that attacks once each time it is asked for the next."""


# ---- the attacks; each goes on for as long as it is asked


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def asked(port: int, request: bytes, seconds: float = 30.0) -> None:
    """Send a request and wait for the beginning of whatever comes."""
    with contextlib.suppress(OSError), connected(port) as connection:
        connection.settimeout(seconds)
        connection.sendall(request)
        connection.recv(4096)


def endless_headers(model: str, port: int, grpc: int) -> Iterator[None]:
    while True:
        with contextlib.suppress(OSError), connected(port) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n")
            for _ in range(1000):
                connection.sendall(b"a:b\r\n" * 10_000)
        yield


def held(port: int, begun: bytes, count: int = 1000) -> Iterator[None]:
    """Connections that say this much and then nothing; those that end are opened anew."""
    connections: list[socket.socket] = []
    while True:
        for _ in range(50):
            with contextlib.suppress(OSError):
                connection = connected(port)
                if begun:
                    connection.sendall(begun)
                connections.append(connection)
        while len(connections) > count:
            connections.pop(0).close()
        time.sleep(0.02)
        yield


def silent(model: str, port: int, grpc: int) -> Iterator[None]:
    return held(port, b"")


def half_headers(model: str, port: int, grpc: int) -> Iterator[None]:
    return held(port, b"GET /v2 HTTP/1.1\r\nhost: local")


def slow_bodies(model: str, port: int, grpc: int) -> Iterator[None]:
    size = 32 * 2**20 - 60
    head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: {size}\r\n\r\n"
    return held(port, head.encode() + bytes(size - 100), 16)


def infer_json(
    model: str, data: bytes, shape: str = "[1,32,32,3]", name: str = "images", kind: str = "UINT8"
) -> bytes:
    head = f'{{"inputs":[{{"name":"{name}","datatype":"{kind}","shape":{shape},"data":'.encode()
    return post(f"/v2/models/{model}/infer", head + data + b"}]}")


def repeated(request: bytes) -> Callable[[int], Iterator[None]]:
    def attack(port: int) -> Iterator[None]:
        while True:
            asked(port, request)
            yield

    return attack


def empty_lists(model: str, port: int, grpc: int) -> Iterator[None]:
    return repeated(infer_json(model, b"[" + b"[]," * 2_700_000 + b"[]]"))(port)


def braces(model: str, port: int, grpc: int) -> Iterator[None]:
    return repeated(post(f"/v2/models/{model}/infer", b'{"inputs":[' + b"{}," * 10_000_000 + b"{}]}"))(port)


def encoded(model: str, files: list[bytes]) -> bytes:
    texts = ",".join(f'"{base64.b64encode(file).decode()}"' for file in files)
    return infer_json(model, f"[{texts}]".encode(), f"[{len(files)}]", "encoded", "BYTES")


def markup(model: str, port: int, grpc: int) -> Iterator[None]:
    return repeated(encoded(model, [b"<?xml" + b"<!" * 4096] * 64))(port)


def scans(model: str, port: int, grpc: int) -> Iterator[None]:
    """A progressive JPEG whose last scan comes 450 times, just below the limit."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((2000, 2000, 3), np.uint8)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return repeated(encoded(model, [data[:-2] + data[last:-2] * 450 + data[-2:]] * 2))(port)


def palettes(model: str, port: int, grpc: int) -> Iterator[None]:
    file = io.BytesIO()
    Image.new("P", (7000, 7000)).save(file, "PNG")
    return repeated(encoded(model, [file.getvalue()] * 64))(port)


def bomb(model: str, port: int, grpc: int) -> Iterator[None]:
    body = gzip.compress(bytes(2**28))
    return repeated(post(f"/v2/models/{model}/infer", body, "content-encoding: gzip"))(port)


def pipelined(model: str, port: int, grpc: int) -> Iterator[None]:
    return repeated(b"GET /v2 HTTP/1.1\r\nhost: localhost\r\n\r\n" * 20_000)(port)


def long_paths(model: str, port: int, grpc: int) -> Iterator[None]:
    body = json.dumps({"data": [{"path": "a/" * 400_000, "meta": {"_type": "gradio.FileData"}}]}).encode()
    return repeated(post("/gradio_api/call/classify", body, "content-type: application/json"))(port)


def small_uploads(model: str, port: int, grpc: int) -> Iterator[None]:
    part = b'--x\r\ncontent-disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n12345678\r\n'
    body = part * 1000 + b"--x--\r\n"
    return repeated(post("/gradio_api/upload", body, "content-type: multipart/form-data; boundary=x"))(port)


def grpc_calls(model: str, port: int, grpc: int) -> Iterator[None]:
    """Calls that never send their message, as many as one connection may have."""
    from grpc import insecure_channel

    while True:
        with insecure_channel(f"127.0.0.1:{grpc}") as channel:
            call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")

            def never() -> Iterator[bytes]:
                time.sleep(3)
                yield from ()

            futures = [call.future(never()) for _ in range(90)]
            time.sleep(2)
            for future in futures:
                future.cancel()
        yield


def grpc_fields(model: str, port: int, grpc: int) -> Iterator[None]:
    import grpc as library

    with library.insecure_channel(f"127.0.0.1:{grpc}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        while True:
            with contextlib.suppress(library.RpcError):
                call(b"\x2a\x00" * 7_000_000, timeout=30)
            yield


HTTP = (
    endless_headers,
    silent,
    half_headers,
    slow_bodies,
    empty_lists,
    braces,
    markup,
    scans,
    palettes,
    bomb,
    pipelined,
)
DEMO, GRPC = (long_paths, small_uploads), (grpc_calls, grpc_fields)
ATTACKS: dict[str, Attack] = {attack.__name__: attack for attack in (*HTTP, *DEMO, *GRPC)}


# ---- what is measured meanwhile


async def answer(reader: asyncio.StreamReader) -> bytes:
    """-> the status line of one answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(re.search(rb"\r\ncontent-length: (\d+)", head)[1]))  # type: ignore[index]
    return head


async def paced(port: int, request: bytes, until: float, found: list[float], lost: list[str]) -> None:
    """Ask every PERIOD; a connection that ended between two requests is opened anew, as any client does."""
    reader = writer = None
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            async with asyncio.timeout(30):
                for fresh in (False, True):
                    if writer is None or reader is None:
                        reader, writer = await asyncio.open_connection("127.0.0.1", port)
                        fresh = True
                    try:
                        writer.write(request)
                        head = await answer(reader)
                        break
                    except (ConnectionError, asyncio.IncompleteReadError):
                        writer = None
                        if fresh:
                            raise
            if not head.startswith(b"HTTP/1.1 200"):
                lost.append(head[:40].decode(errors="replace"))
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            lost.append(type(error).__name__)
            writer = None
        found.append(time.monotonic() - began)
        await asyncio.sleep(max(0.0, PERIOD - found[-1]))
    if writer is not None:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def memory(pid: int) -> float:
    """-> resident MiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


async def measured(pid: int, port: int, good: bytes, seconds: float) -> dict[str, object]:
    took, lost, probes, dead = list[float](), list[str](), list[float](), list[str]()
    until, peak = time.monotonic() + seconds, memory(pid)
    probe = b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
    tasks = [asyncio.create_task(paced(port, good, until, took, lost)) for _ in range(CLIENTS)]
    tasks.append(asyncio.create_task(paced(port, probe, until, probes, dead)))
    while not all(task.done() for task in tasks):
        peak = max(peak, memory(pid))
        await asyncio.sleep(0.1)
    await asyncio.gather(*tasks)
    return {
        "good": len(took),
        "lost": len(lost),
        "reasons": sorted(set(lost))[:3],
        "p50": round(float(np.percentile(took, 50)), 3),
        "p99": round(float(np.percentile(took, 99)), 3),
        "slowest": round(max(took), 3),
        "probe": round(max(probes), 3),
        "probes_lost": len(dead),
        "peak_mib": round(peak),
    }


@contextlib.contextmanager
def server(bundle: str, demo: bool, grpc: bool) -> Iterator[tuple[int, int, int]]:
    """-> (process, port, gRPC's port)."""
    flags = [*([] if demo else ["--no-demo"]), *(["--grpc-port", "0"] if grpc else [])]
    command = [sys.executable, "-m", "serve.command", bundle, "--port", "0", "--log-format", "json", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        for line in process.stderr:
            if '"message": "ready"' in line:
                said = json.loads(line)
                break
        else:
            raise SystemExit("the server did not start")
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield process.pid, int(said["url"].rpartition(":")[2]), said.get("grpc_port", 0)
    finally:
        process.terminate()
        process.wait(60)
        drain.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", nargs="+", choices=sorted(ATTACKS), metavar="NAME")
    parser.add_argument("--demo", action="store_true", help="with the demo, and the attacks on it")
    parser.add_argument("--grpc", action="store_true", help="with gRPC, and the attacks on it")
    parser.add_argument(
        "--after", type=float, default=10.0, help="seconds until the memory is looked at again"
    )
    parser.add_argument("--attacker", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.attacker:
        name, model, port, grpc = given.attacker
        for _ in ATTACKS[name](model, int(port), int(grpc)):
            pass

    bundle = load_bundle(given.bundle)
    size = bundle.preprocessing
    pixels = json.dumps([0] * (size.height * size.width * 3)).encode()
    good = infer_json(bundle.name, pixels, f"[1,{size.height},{size.width},3]")
    chosen = given.only or [
        one.__name__ for one in (*HTTP, *(DEMO if given.demo else ()), *(GRPC if given.grpc else ()))
    ]
    with server(given.bundle, given.demo, given.grpc) as (pid, port, grpc):
        asyncio.run(measured(pid, port, good, min(5.0, given.seconds)))  # the pools and caches fill
        for name in chosen:
            before = memory(pid)
            attack = [
                sys.executable,
                __file__,
                given.bundle,
                "--attacker",
                name,
                bundle.name,
                str(port),
                str(grpc),
            ]
            attacker = subprocess.Popen(attack, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(1.5)  # it has begun
            try:
                found = asyncio.run(measured(pid, port, good, given.seconds))
                ended = attacker.poll()
            finally:
                attacker.kill()
                attacker.wait()
            time.sleep(given.after)
            after = memory(pid)
            print(
                json.dumps(
                    {"attack": name, **found, "before_mib": round(before), "after_mib": round(after)}
                    | ({"attacker_died": ended} if ended is not None else {})
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
