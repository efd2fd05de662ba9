"""What of Gradio a client may reach: no path, address or route but its own uploads and what the page needs.

Each test that guards against a known advisory names it.
"""

from __future__ import annotations

import base64
import os
import tempfile
from pathlib import Path
from typing import Any

import httpx
import pytest


def call(running: Any, value: Any, **options: Any) -> httpx.Response:
    """POST the value as the image of the named endpoint."""
    return httpx.post(f"{running.url}/gradio_api/call/classify", json={"data": [value]}, **options)


def file_data(**fields: Any) -> dict[str, Any]:
    return {"meta": {"_type": "gradio.FileData"}, "orig_name": "x.png", **fields}


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
