"""What is refused: foreign pages, strangers, bodies too large, too slow or too many,
files and URLs that are not the client's.

Each test that guards against a known advisory names it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ffl_deploy.bundle import Bundle
from serve.server.limits import PIECE, Bodies, HostAndOrigin, own_hosts
from serve.server.offline import SILENCE, private_environment
from serve.server.settings import Limits, ModelSpec, Settings

Start = Callable[..., contextlib.AbstractContextManager[Any]]
SMALL = Limits(body_bytes=20_000, demo_json_bytes=5_000, upload_bytes=50_000, bytes_in_flight=100_000)


@pytest.fixture(scope="module")
def demo(
    two_bundles: tuple[Bundle, Bundle], start_server: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Both bundles with the demo and small limits."""
    models = tuple(ModelSpec(bundle.name, bundle.folder) for bundle in two_bundles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads") / "gradio"))
        with start_server(Settings(models, limits=SMALL)) as running:
            yield running


def call(running: Any, value: Any, **options: Any) -> httpx.Response:
    """POST the value as the image of the named endpoint."""
    return httpx.post(f"{running.url}/gradio_api/call/classify", json={"data": [value]}, **options)


def file_data(**fields: Any) -> dict[str, Any]:
    return {"meta": {"_type": "gradio.FileData"}, "orig_name": "x.png", **fields}


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
    listens: str, allowed: tuple[str, ...], host: str, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page's name can be rebound to this machine's address; an address cannot be rebound to anything."""
    monkeypatch.setattr(socket, "gethostname", lambda: "This-Machine.example.net")
    statuses: list[int] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    guarded = HostAndOrigin(application, own_hosts(listens, allowed))
    scope = {"type": "http", "path": "/", "headers": [(b"host", host.encode())]}
    asyncio.run(guarded(scope, None, send))  # type: ignore[arg-type]
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


def test_a_data_url_in_json_does_not_pass_over_the_limit_and_is_not_read_at_all(demo: Any) -> None:
    """Gradio's `max_file_size` does not see it: measured there, a body of 40 MB was read."""
    data = "data:image/png;base64," + base64.b64encode(b"x" * 6_000).decode()
    assert call(demo, file_data(path="x", url=data)).status_code == 413
    short = "data:image/png;base64,AAAA"
    assert call(demo, file_data(path="", url=short)).status_code == 403


@pytest.mark.parametrize(
    "reference",
    [
        {"path": "/etc/passwd"},
        {"path": "../../../etc/passwd"},
        {"path": "http://127.0.0.1:1/x.png"},
        {"path": "file:///etc/passwd"},
        {"path": "", "url": "http://169.254.169.254/latest/meta-data"},
        {"path": "", "url": "http://x/gradio_api/file/../../etc/passwd"},
        {"path": os.path.join(tempfile.gettempdir(), "gradio", "x\0.png")},
    ],
)
def test_no_path_or_url_of_a_client_is_read(demo: Any, reference: dict[str, str]) -> None:
    """CVE-2024-1561, CVE-2023-51449, CVE-2024-4941 (files); CVE-2024-4325, CVE-2024-1183,
    CVE-2024-47167 (URLs)."""
    assert call(demo, file_data(**reference)).status_code == 403
    assert call(demo, {"nested": [file_data(**reference)]}).status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=http://127.0.0.1:1/",
        "/gradio_api/file=%2Fetc%2Fpasswd",
        "/gradio_api/file=//etc/passwd",
    ],
)
def test_the_file_route_reads_uploads_only(demo: Any, path: str) -> None:
    """CVE-2023-51449, CVE-2024-34510, CVE-2024-10648: path traversal and SSRF through /file=."""
    assert httpx.get(demo.url + path).status_code in (403, 404)


def test_a_link_in_the_upload_folder_leads_nowhere(demo: Any, tmp_path: Path) -> None:
    from serve.demo.guard import upload_folder

    upload_folder().mkdir(parents=True, exist_ok=True)
    link = upload_folder() / "link"
    link.symlink_to("/etc/passwd")
    try:
        assert httpx.get(f"{demo.url}/gradio_api/file={link}").status_code == 403
    finally:
        link.unlink()


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/component_server",
        "/gradio_api/vibe-edit",
        "/gradio_api/process_recording",
        "/gradio_api/stream/x",
        "/gradio_api/deep_link",
        "/gradio_api/dev/reload",
        "/monitoring",
        "/monitoring/summary",
        "/login",
        "/docs",
        "/openapi.json",
        "/gradio_api/runs",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_routes_of_gradio_that_the_demo_does_not_need_do_not_exist(demo: Any, path: str, method: str) -> None:
    """CVE-2024-48052 and GHSA-3c67-5hwx-f6wx (proxy), CVE-2024-47867's kind:
    what is not there cannot be attacked."""
    response = httpx.request(method, demo.url + path)
    assert response.status_code == 404
    assert response.json() == {"error": "the demo has no such route"}


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


def test_the_upload_folder_has_a_quota(two_bundles: tuple[Bundle, Bundle]) -> None:
    """Bad input 33: a flood of uploads meets 503, not a full disk."""
    from serve.demo.guard import DemoGuard, upload_folder

    upload_folder().mkdir(parents=True, exist_ok=True)
    held = upload_folder() / "held"
    held.write_bytes(b"x" * 1000)

    class Service:
        settings = Settings((), limits=Limits(upload_folder_bytes=1000))
        endings: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached the demo")

    sent: list[Any] = []

    async def main() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "path": "/gradio_api/upload",
            "method": "POST",
            "headers": [(b"content-length", b"10")],
        }
        await DemoGuard(application, Service())(scope, None, send)  # type: ignore[arg-type]

    try:
        asyncio.run(main())
    finally:
        held.unlink()
    assert sent[0]["status"] == 503


def test_the_page_forbids_the_browser_every_foreign_request(demo: Any) -> None:
    response = httpx.get(demo.url)
    assert response.status_code == 200
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "http" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("suffix", ["svg", "html", "js"])
def test_an_uploaded_page_is_not_shown_as_one(demo: Any, suffix: str) -> None:
    """CVE-2024-47872: stored XSS through uploaded HTML, JS or SVG."""
    content = b"<script>alert(1)</script>"
    (path,) = httpx.post(f"{demo.url}/gradio_api/upload", files={"files": (f"x.{suffix}", content)}).json()
    response = httpx.get(f"{demo.url}/gradio_api/file={path}")
    assert response.headers["content-disposition"].startswith("attachment")
    assert "html" not in response.headers["content-type"]


@pytest.fixture
def locked(two_bundles: tuple[Bundle, Bundle], start_server: Start) -> Iterator[Any]:
    settings = Settings(
        (ModelSpec("fused", two_bundles[0].folder),), demo=False, token="correct-horse-battery"
    )
    with start_server(settings) as running:
        yield running


def test_the_token_is_needed_everywhere_but_for_probes(locked: Any) -> None:
    from tritonclient import http as triton

    for path in ("/v2", "/v2/models/fused", "/metrics", "/"):
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic !"},
            {"authorization": "correct-horse-battery"},
        ):
            refused = httpx.get(locked.url + path, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic")
        assert (
            httpx.get(
                locked.url + path, headers={"authorization": "Bearer correct-horse-battery"}
            ).status_code
            == 200
        )
        assert httpx.get(locked.url + path, auth=("anyone", "correct-horse-battery")).status_code == 200
    assert httpx.get(f"{locked.url}/v2/health/ready").status_code == 200
    with contextlib.closing(triton.InferenceServerClient(locked.address)) as client:
        assert (
            client.get_model_metadata("fused", headers={"Authorization": "Bearer correct-horse-battery"})[
                "name"
            ]
            == "fused"
        )


def test_the_token_never_shows() -> None:
    assert "secret" not in repr(Settings((), token="secret-secret-secret"))


def test_temporary_files_go_with_the_process_and_orphans_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (*SILENCE, "GRADIO_TEMP_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")
    with private_environment() as alive:
        assert os.environ["GRADIO_TEMP_DIR"].startswith(str(alive))
        assert all(os.environ[name] == value for name, value in SILENCE.items())
        orphan = tmp_path / "ffl-serve-orphan"
        orphan.mkdir()
        (orphan / ".lock").touch()
        tempfile.tempdir = str(tmp_path)
        with private_environment():
            assert not orphan.exists()
            assert alive.exists()
    assert list(tmp_path.iterdir()) == []


def connections(process: int) -> set[str]:
    """-> the far ends, as /proc/net writes them, of all TCP and UDP sockets that the process has."""
    sockets = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            sockets.add(os.readlink(link))
    rows = [
        line.split()
        for table in ("tcp", "tcp6", "udp", "udp6")
        if Path(f"/proc/{process}/net/{table}").exists()
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]
    ]
    found = {row[2].partition(":")[0] for row in rows if f"socket:[{row[9]}]" in sockets}
    assert found, "the server has its port open"
    return found


def test_nothing_is_written_outside_the_temporary_folder_and_telemetry_is_off(
    two_bundles: tuple[Bundle, Bundle], serve_process: Start, tmp_path: Path
) -> None:
    """ONNX Runtime writes and calls home from the import on unless told before it; Gradio,
    Matplotlib and the hub have caches."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in SILENCE and not k.startswith(("XDG_", "GRADIO_", "HF_"))
    }
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    with serve_process(str(two_bundles[0].folder), env=environment) as running:
        assert httpx.get(running.url).status_code == 200
        (path,) = httpx.post(f"{running.url}/gradio_api/upload", files={"files": ("x.png", b"x")}).json()
        assert path.startswith(str(temporary))
        assert connections(running.process.pid) <= {"0100007F", "00000000"}, "to this machine, or listening"
        running.process.terminate()
        assert running.process.wait(60) == 0
    assert list(home.rglob("*")) == []
    assert list(temporary.rglob("*")) == []


def test_it_imports_no_torch_and_gradio_only_for_the_demo(two_bundles: tuple[Bundle, Bundle]) -> None:
    code = """
import sys, time
from serve.app import create_app
from serve.command import parse_arguments
from starlette.testclient import TestClient

with TestClient(create_app(parse_arguments(sys.argv[1:]))) as client:
    while client.get("/v2/health/ready").status_code != 200: time.sleep(0.05)
print(sorted({"torch", "gradio", "scipy.stats", "sklearn", "ray"} & set(sys.modules)))
"""
    for arguments, expected in ((["--no-demo"], "[]"), ([], "['gradio']")):
        command = [
            sys.executable,
            "-c",
            code,
            str(two_bundles[0].folder),
            "--allow-host",
            "testserver",
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=140, check=False)
        assert done.stdout.strip().splitlines()[-1:] == [expected], done.stderr


def test_gradio_is_imported_while_the_bundles_load(two_bundles: tuple[Bundle, Bundle]) -> None:
    """One after the other they would take seconds longer to be ready."""
    code = """
import sys, time
import serve.server.service
from serve.app import create_app
from serve.command import parse_arguments
from starlette.testclient import TestClient

def slow(*arguments, real=serve.server.service.open_model):
    deadline = time.monotonic() + 30
    while "gradio" not in sys.modules and time.monotonic() < deadline: time.sleep(0.02)
    print("gradio" in sys.modules)
    return real(*arguments)

serve.server.service.open_model = slow
with TestClient(create_app(parse_arguments(sys.argv[1:]))) as client:
    while client.get("/v2/health/ready").status_code != 200: time.sleep(0.05)
"""
    command = [sys.executable, "-c", code, str(two_bundles[0].folder), "--allow-host", "testserver"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["True"], done.stderr


def test_log_lines_cannot_be_forged() -> None:
    import logging

    from serve.server.logs import JsonFormatter

    record = logging.LogRecord("x", 20, "", 0, 'a\n{"level": "error"}', None, None)
    record.path = "/\r\nfake"
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["path"] == "/\r\nfake"


def test_what_libraries_print_is_logged_a_record_a_line() -> None:
    code = """
import logging, logging.config, os, sys
from serve.server.logs import log_config
from serve.server.stray import stray_output_logged
print("before", file=sys.stderr)
with stray_output_logged() as real:
    logging.config.dictConfig(log_config("json", real))
    print("Traceback (most recent call last):\\n  in a library\\n", file=sys.stderr)
    print("progress", end="")
    print(" done")
    os.write(2, b"Fax4Decode: bad code\\n{")
    print("x" * 5000, file=sys.stderr)
    logging.getLogger("ffl.serve").warning("ours")
print("after", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    first, *lines, last = done.stderr.splitlines()
    assert (first, last, done.stdout) == ("before", "after", "")
    records = [json.loads(line) for line in lines]
    assert {(record["message"], record.get("stream")) for record in records} == {
        ("Traceback (most recent call last):", "stderr"),
        ("  in a library", "stderr"),
        ("progress done", "stdout"),
        ("Fax4Decode: bad code", "native"),
        ("{", "native"),
        ("x" * 2000, "stderr"),
        ("ours", None),
    }


def test_the_log_of_bad_demo_requests_is_one_object_a_line(
    two_bundles: tuple[Bundle, Bundle], serve_process: Start
) -> None:
    """Seven of them gave 80 lines of Gradio's tracebacks."""
    with serve_process(str(two_bundles[0].folder), "--access-log") as running:
        for content in (b'{"data": [1]}', b'{"data": "x"}', b"{}", b'{"data": [{"path": null}]}'):
            httpx.post(f"{running.url}/gradio_api/call/classify", content=content)
        httpx.post(
            f"{running.url}/gradio_api/queue/join",
            json={"data": [], "fn_index": 10**6, "session_hash": "x"},
        )
        httpx.post(f"{running.url}/gradio_api/run/nothing", content=b'{"data": []}')
        deadline = time.monotonic() + 60  # a request is logged once it has been answered
        while running.read_log().count('"status"') < 6 and time.monotonic() < deadline:
            time.sleep(0.05)
        records = [json.loads(line) for line in running.read_log().split("\n")[:-1]]
    assert sum("status" in record for record in records) >= 6


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


def test_a_path_of_half_a_million_folders_is_refused_by_its_length(demo: Any) -> None:
    """To resolve it stopped the whole server for 35 s."""
    from serve.demo.guard import _in_upload_folder, upload_folder

    folder = str(upload_folder())
    assert _in_upload_folder(f"{folder}/a/x.png")
    for path in (
        f"{folder}/" + "a/" * 500_000 + "x.png",
        f"{folder}/../x.png",
        f"{folder}/a/../../x.png",
        f"{folder}/./x.png",
        f"{folder}",
        f"{folder}x/x.png",
        "/etc/passwd",
        "x.png",
        f"{folder}/a\0/x.png",
    ):
        assert not _in_upload_folder(path), path[:200]
    reference = file_data(path=f"{folder}/" + "a/" * 2000)
    assert call(demo, reference).status_code in (403, 413)


@pytest.mark.parametrize(
    "query", ["upload_id=" + "a" * 41, "upload_id=%41", "upload_id=a&x=1", "x=1", "upload_id="]
)
def test_uploads_have_no_parameters_that_are_remembered(demo: Any, query: str) -> None:
    for method, path in (("GET", "upload_progress"), ("POST", "upload")):
        response = httpx.request(method, f"{demo.url}/gradio_api/{path}?{query}", files={"files": b"x"})
        assert response.status_code == 400


def test_the_progress_of_uploads_is_bounded() -> None:
    from gradio.routes import file_upload_statuses

    from serve.demo.sessions import UPLOADS_REMEMBERED, forget_progress

    async def ask() -> None:
        for number in range(UPLOADS_REMEMBERED + 50):
            file_upload_statuses.set_done(f"id{number}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(file_upload_statuses.is_tracked(f"asked{number}"), 0.0001)

    asyncio.run(ask())
    forget_progress()
    assert len(file_upload_statuses._statuses) == len(file_upload_statuses._signals) == UPLOADS_REMEMBERED
    assert f"id{UPLOADS_REMEMBERED + 49}" in file_upload_statuses._statuses


def test_small_files_count_as_what_they_take(tmp_path: Path) -> None:
    """28,010 files of 8 bytes took 111 MiB of the disk and counted as 0.1 MiB."""
    from serve.demo.guard import ENTRY_BYTES, _folder_bytes

    for number in range(50):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "x").write_bytes(b"12345678")
    assert _folder_bytes(tmp_path) >= 100 * ENTRY_BYTES


def test_old_uploads_are_pruned_with_their_folders_while_others_arrive(tmp_path: Path) -> None:
    from serve.demo.ages import Ages
    from serve.demo.sessions import prune

    for name in ("examples/0.png", "reports/0-report.png", "aa/old.png", "bb/kept.png", "tmp1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    keep = {str(tmp_path / "bb/kept.png")}
    ages = Ages()
    assert prune(tmp_path, 3600, keep, ages) == set(), "nothing is an hour old"
    assert prune(tmp_path, -1, keep, ages) == {str(tmp_path / "aa/old.png")}
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == [
        "bb",
        "bb/kept.png",
        "examples",
        "examples/0.png",
        "reports",
        "reports/0-report.png",
        "tmp1",
    ]


def test_a_sweep_that_fails_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio's own pruning ended for good with the first set that changed meanwhile."""
    from serve.demo import sessions

    swept: list[int] = []

    def fail(page: Any) -> None:
        swept.append(1)
        raise RuntimeError("Set changed size during iteration")

    monkeypatch.setattr(sessions, "SWEEP_SECONDS", 0.0)
    monkeypatch.setattr(sessions, "forget_finished", fail)

    async def main() -> None:
        async with sessions.swept(Any, tmp_path):  # type: ignore[arg-type]
            while len(swept) < 3:
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_lies_beside_a_bundle_is_shown_only_if_it_is_plain(tmp_path: Path) -> None:
    """A link named report.png gave any file of the server to any client."""
    from PIL import Image

    from serve.demo.reports import read_regular, read_report, write_picture

    secret = tmp_path / "secret"
    secret.write_text("TOP-SECRET-KEY")
    link, target = tmp_path / "report.png", tmp_path / "shown.png"
    link.symlink_to(secret)
    assert not write_picture(link, target)
    link.unlink()
    for content in (b"TOP-SECRET-KEY", b""):
        link.write_bytes(content)
        assert not write_picture(link, target)
    assert not target.exists()
    hidden = tmp_path / "hidden.png"
    Image.new("RGB", (4, 3), (9, 8, 7)).save(hidden)
    link.write_bytes(hidden.read_bytes() + b"TOP-SECRET-KEY")
    assert write_picture(link, target)
    assert b"SECRET" not in target.read_bytes()
    with Image.open(target) as shown:
        assert shown.size == (4, 3)

    report = tmp_path / "report.json"
    for device in ("/dev/zero", str(secret)):
        report.unlink(missing_ok=True)
        report.symlink_to(device)
        assert read_report(report) is None
    report.unlink()
    os.mkfifo(report)
    assert read_report(report) is None
    with pytest.raises(OSError, match="plain file of at most 3 bytes"):
        read_regular(secret, 3)
