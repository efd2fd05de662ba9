"""How much of uploads is kept, for how long, and what is remembered of them."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from ffl_deploy.bundle import Bundle
from serve.server.settings import Limits, Settings


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
