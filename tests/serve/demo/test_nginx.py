"""The demo and the protocol behind a real nginx: plain, below a prefix, with HTTPS in front,
in a real Chromium."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium on the PATH"),
    pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx on the PATH"),
]
Start = Callable[..., contextlib.AbstractContextManager[Any]]
DOCS = Path(__file__).parents[3] / "docs" / "serving.md"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def documented(kind: str, upstream: str) -> str:
    """-> the configuration that docs/serving.md shows under `# KIND`, for a server at `upstream`."""
    found = re.search(rf"# {kind}\n((?:    .*\n|\n)+?)(?=    # |\n[^ ])", DOCS.read_text())
    assert found, f"docs/serving.md shows no nginx configuration for {kind!r}"
    return found.group(1).replace("127.0.0.1:7860", upstream)


@pytest.fixture(scope="module")
def pair(make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    options = {"size": 16, "classes": tuple("0123456789"), "cam": True}
    return [make_bundle(folder / "fused", **options), make_bundle(folder / "branch0", seed=1, **options)]


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[[str, int], None]]:
    """`nginx(locations, port, tls)` -> nothing, once it answers."""
    with contextlib.ExitStack() as stack:

        def start(locations: str, port: int, tls: bool = False) -> None:
            secure = ""
            if tls:
                certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
                command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
                subject = ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
                subprocess.run([*command, *subject], check=True, capture_output=True)
                secure = f"ssl_certificate {certificate}; ssl_certificate_key {key};"
            places = "".join(
                f"{kind}_temp_path {tmp_path}/{kind};"
                for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            (tmp_path / "nginx.conf").write_text(
                f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; worker_processes 1;\n"
                "events {}\n"
                f"http {{ access_log off; {places} client_max_body_size 300m;\n"
                f"server {{ listen 127.0.0.1:{port}{' ssl' if tls else ''}; {secure}\n{locations}\n}} }}\n"
            )
            log = stack.enter_context((tmp_path / "out.log").open("w"))
            command = ["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
            process = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    return
                assert process.poll() is None, (tmp_path / "out.log").read_text()
                time.sleep(0.05)
            pytest.fail("nginx does not answer")

        yield start


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(
    ("kind", "path", "flags"),
    [
        ("plain", "/", []),
        ("below a prefix", "/app/", ["--root-path", "/app"]),
        ("with HTTPS", "/", []),
    ],
    ids=["plain", "prefix", "https"],
)
def test_page_and_protocol_work_behind_the_documented_nginx(
    kind: str,
    path: str,
    flags: list[str],
    pair: list[Bundle],
    serve_process: Start,
    nginx: Callable[..., None],
    chromium: Any,
    tmp_path: Path,
) -> None:
    port, tls = free_port(), kind == "with HTTPS"
    folders = [str(bundle.folder) for bundle in pair]
    with serve_process(*folders, "--trust-proxy", "127.0.0.1", "--access-log", *flags) as running:
        nginx(documented(kind, running.address), port, tls)
        url = f"http{'s' if tls else ''}://localhost:{port}{path}"

        # the protocol, from a program
        trust = ssl.create_default_context(cafile=str(tmp_path / "cert.pem")) if tls else True
        images = np.zeros((2, 16, 16, 3), np.uint8)
        tensor = {
            "name": "images",
            "shape": images.shape,
            "datatype": "UINT8",
            "data": images.ravel().tolist(),
        }
        headers = {"origin": url.removesuffix(path)}
        answer = httpx.post(
            f"{url}v2/models/fused/infer", json={"inputs": [tensor]}, headers=headers, verify=trust
        )
        assert answer.status_code == 200
        logits = next(output["data"] for output in answer.json()["outputs"] if output["name"] == "logits")
        expected = pair[0].session().run(images).logits.ravel()
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        foreign = {"origin": "http://evil.example"}
        assert httpx.get(f"{url}v2", headers=foreign, verify=trust).status_code == 403

        # the page, by a person: events come through, uploads too
        picture = tmp_path / "picture.png"
        Image.new("RGB", (40, 30), (200, 30, 30)).save(picture)
        context = chromium.new_context(ignore_https_errors=tls)
        page, troubles = context.new_page(), []
        # below a prefix the browser itself looks for an icon at the root, which is not ours
        icon = f"{url.removesuffix(path)}/favicon.ico" if path != "/" else ""

        def note(said: Any) -> None:
            if said.type == "error" and said.location["url"] != icon:
                troubles.append(said.text)

        page.on("console", note)
        page.on("response", lambda got: got.status >= 400 and troubles.append(f"{got.status} {got.url}"))
        page.on(
            "request", lambda sent: sent.url.startswith((url, "data:", "blob:")) or troubles.append(sent.url)
        )
        page.goto(url)
        page.get_by_role("tab", name="Classify").click()
        page.locator("input[type=file]").first.set_input_files(picture)
        label = page.locator(".answer-fused").get_by_test_id("label-output-value").first
        label.wait_for(timeout=60_000)
        assert label.inner_text().strip() == pair[0].predict([picture])[0].label
        assert troubles == []
        context.close()
