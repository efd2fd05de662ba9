"""The benchmark of attacks: each of them reaches the server, and what it reports can fail."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serve_attacks
from ffl_deploy.bundle import Bundle

ROOT = Path(__file__).parents[2]


def test_a_run_reports_what_the_good_clients_saw(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "fused")
    flags = ["--seconds", "1", "--after", "0", "--only", "silent", "pipelined"]
    script = ROOT / "benchmarks" / "serve_attacks.py"
    done = subprocess.run(
        [sys.executable, str(script), str(bundle.folder), *flags],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["attack"] for line in lines] == ["silent", "pipelined"]
    for line in lines:
        assert (line["lost"], line["probes_lost"]) == (0, 0), line
        assert line["good"] > 0
        assert "attacker_died" not in line
        assert line["peak_mib"] >= line["before_mib"] > 0


def test_what_is_lost_is_counted() -> None:
    """A server that answers every other request with 503 and then closes."""

    async def run() -> tuple[list[float], list[str]]:
        answers = iter([b"200 OK", b"503 Busy"] * 1000)

        async def serve(reader: Any, writer: Any) -> None:
            try:
                while await reader.readuntil(b"\r\n\r\n"):
                    writer.write(b"HTTP/1.1 " + next(answers) + b"\r\ncontent-length: 0\r\n\r\n")
            except asyncio.IncompleteReadError:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        found, lost = list[float](), list[str]()
        until = asyncio.get_running_loop().time() + 1
        await serve_attacks.paced(port, b"GET / HTTP/1.1\r\n\r\n", until, found, lost)
        server.close()
        await asyncio.sleep(0.1)  # its side of the connection ends
        return found, lost

    found, lost = asyncio.run(run())
    assert abs(len(lost) - len(found) / 2) <= 1
    assert set(lost) == {"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n"[:40]}


@pytest.mark.parametrize("name", ["empty_lists", "braces", "markup", "palettes", "bomb"])
def test_an_attack_sends_what_it_is_about(name: str) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as port:
        sent: list[bytes] = []

        def take() -> None:
            connection = port.accept()[0]
            content = b""
            while b"\r\n\r\n" not in content or len(content) < 100_000:
                piece = connection.recv(1 << 20)
                if not piece:
                    break
                content += piece
            sent.append(content)
            connection.close()

        thread = threading.Thread(target=take)
        thread.start()
        next(serve_attacks.ATTACKS[name]("fused", port.getsockname()[1], 0))
        thread.join()
    assert sent[0].startswith(b"POST /v2/models/fused/infer HTTP/1.1\r\n")
    assert len(sent[0]) >= 100_000
