"""Who is answered, and under which name: pages of other origins, rebound names, other machines.

Each test that guards against a known advisory names it.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from ffl_deploy.bundle import Bundle
from serve.server.limits import HostAndOrigin, own_hosts

StatusesBehind = Callable[[Callable[[Any], Any], dict[str, Any]], list[int]]


@pytest.mark.parametrize(
    "path",
    ["/v2/models/fused/infer", "/gradio_api/call/classify", "/gradio_api/upload", "/gradio_api/queue/join"],
)
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1.evil.example"]
)
def test_a_post_from_a_foreign_page_is_never_executed(demo: Any, path: str, origin: str) -> None:
    """CVE-2024-47084 and CVE-2024-47168's kind: a page elsewhere drives a server on this machine."""
    response = httpx.post(demo.url + path, content=b"{}", headers={"origin": origin})
    assert response.status_code == 403
    assert "another origin" in response.json()["error"]


@pytest.mark.parametrize(
    ("listens", "allowed", "host", "is_ours"),
    [
        ("127.0.0.1", (), "localhost:7860", True),
        ("127.0.0.1", (), "10.0.0.7:7860", False),
        ("0.0.0.0", (), "10.0.0.7:7860", True),
        ("0.0.0.0", (), "[fe80::1]:7860", True),
        ("0.0.0.0", (), "localhost", True),
        ("0.0.0.0", (), "this-machine:7860", True),
        ("0.0.0.0", (), "this-machine.local", True),
        ("0.0.0.0", (), "evil.example", False),
        ("0.0.0.0", (), "10.0.0.7.evil.example", False),
        ("0.0.0.0", (), "", False),
        ("0.0.0.0", (), "[::", False),
        ("0.0.0.0", ("models.example",), "models.example", True),
        ("0.0.0.0", ("*",), "evil.example", True),
        ("models.example", (), "models.example:80", True),
    ],
)
def test_an_open_server_answers_for_its_names_and_for_addresses(
    listens: str,
    allowed: tuple[str, ...],
    host: str,
    is_ours: bool,
    statuses_behind: StatusesBehind,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A page's name can be rebound to this machine's address; an address cannot be rebound to anything."""
    monkeypatch.setattr(socket, "gethostname", lambda: "This-Machine.example.net")
    scope = {"type": "http", "path": "/", "headers": [(b"host", host.encode())]}
    statuses = statuses_behind(lambda app: HostAndOrigin(app, own_hosts(listens, allowed)), scope)
    assert statuses == [200 if is_ours else 421]


def test_its_own_page_may_post(demo: Any) -> None:
    response = httpx.post(f"{demo.url}/v2/models/fused/infer", content=b"{}", headers={"origin": demo.url})
    assert response.status_code == 400


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "[::", ""])
def test_a_rebound_name_is_not_answered(demo: Any, host: str) -> None:
    """DNS rebinding: the foreign page's own name points at this machine, so its Origin and Host agree."""
    response = httpx.get(f"{demo.url}/v2/models/fused", headers={"host": host, "origin": f"http://{host}"})
    assert response.status_code == 421
    assert httpx.get(f"{demo.url}/v2/health/ready", headers={"host": "10.0.0.7:7860"}).status_code == 200


def test_bind_to_the_world_warns(two_bundles: tuple[Bundle, Bundle]) -> None:
    command = [
        sys.executable,
        "-m",
        "serve.command",
        str(two_bundles[0].folder),
        "--no-demo",
        "--port",
        "0",
        "--host",
        "0.0.0.0",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        first = json.loads(process.stderr.readline())
        assert first["level"] == "warning"
        assert "without a token" in first["message"]
    finally:
        process.terminate()  # at once: a signal during start-up must not be lost
        process.communicate(timeout=60)
    assert process.returncode == 0
