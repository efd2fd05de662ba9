"""The demo behind its page: the endpoint for clients, drawings, batches, reports. (What a person sees:
test_browser.py.)"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle
from ffl_deploy.images import decode
from serve.demo.page import kind_of
from serve.server.offline import SILENCE
from serve.server.settings import Limits, ModelSpec, Settings

Start = Callable[..., contextlib.AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def digit_bundles(
    make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Bundle]:
    """Gray 16 x 16 bundles with a class activation map, so that every part of the page exists."""
    folder = tmp_path_factory.mktemp("digits")
    options = {"size": 16, "classes": tuple("0123456789"), "gray": True, "cam": True}
    return make_bundle(folder / "fused", **options), make_bundle(folder / "branch0", seed=1, **options)


@pytest.fixture(scope="module")
def demo(
    digit_bundles: tuple[Bundle, Bundle], start_server: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    models = tuple(ModelSpec(bundle.name, bundle.folder) for bundle in digit_bundles)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SILENCE.items():
            patch.setenv(name, value)
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads") / "gradio"))
        with start_server(
            Settings(models, protocol=False, limits=Limits(batch_images=40, demo_sessions=4))
        ) as running:
            yield running


def save(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_the_endpoint_answers_gradio_client_as_the_bundles_answer(
    demo: Any, digit_bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    from gradio_client import Client, handle_file

    photo = save(tmp_path / "photo.png", size=(300, 200))
    client = Client(demo.url, verbose=False, download_files=str(tmp_path))
    try:
        described = client.view_api(return_format="dict")["named_endpoints"]  # type: ignore[call-overload]
        assert list(described) == ["/classify"]
        assert described["/classify"]["parameters"][0]["parameter_name"] == "image"
        answers = client.predict(image=handle_file(str(photo)), api_name="/classify")
    finally:
        client.close()
    assert set(answers) == {"fused", "branch0"}
    for bundle in digit_bundles:
        expected = bundle.predict([photo])[0]
        answer = answers[bundle.name]
        assert (answer["label"], answer["confidence"]) == (expected.label, expected.confidence)
        assert [(entry["label"], entry["confidence"]) for entry in answer["top"]] == expected.top
        assert answer["milliseconds"] > 0


@pytest.mark.parametrize(("content", "says"), [(b"", "the file is empty"), (b"<html>", "not one of JPEG")])
def test_a_bad_file_is_a_message_and_the_next_request_works(
    demo: Any, tmp_path: Path, content: bytes, says: str
) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    bad, good = tmp_path / "bad.png", save(tmp_path / "good.png")
    bad.write_bytes(content)
    client = Client(demo.url, verbose=False)
    try:
        with pytest.raises(AppError, match=says):
            client.predict(image=handle_file(str(bad)), api_name="/classify")
        assert client.predict(image=handle_file(str(good)), api_name="/classify")["fused"]["label"]
    finally:
        client.close()


def test_the_demo_alone_has_health_and_no_protocol(demo: Any) -> None:
    assert httpx.get(f"{demo.url}/v2/health/ready").status_code == 200
    assert httpx.get(f"{demo.url}/v2/models/fused").status_code == 404
    assert httpx.post(f"{demo.url}/v2/models/fused/infer", content=b"{}").status_code == 404


async def _classify(demo: Any, paths: list[Path]) -> tuple[list[Any], Any]:
    """-> (number of rows after each step, the last state); run in the server's own loop,
    where its batchers answer."""
    from serve.demo.batch import classify_files

    steps, state = [], None
    async for state in classify_files(
        demo.service, demo.service.models["fused"], [str(path) for path in paths]
    ):
        steps.append(len(state.rows))
    return steps, state


def test_a_batch_gives_the_rows_of_ffl_predict(
    demo: Any, digit_bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    """Images, a zip with a nested folder and other files, and a broken file: one row each, in order,
    in CSV and Parquet."""
    from serve.demo.batch import write_table

    first, second = save(tmp_path / "first.png", 1), save(tmp_path / "second.png", 2)
    (tmp_path / "=bad.jpg").write_bytes(b"<html>")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(second, "inner/third.png")
        archive.writestr("notes.txt", "not an image")
    paths = [first, second, tmp_path / "=bad.jpg", tmp_path / "more.zip"]
    _, state = asyncio.run(_classify(demo, paths))
    assert [row.path for row in state.rows] == [
        "first.png",
        "second.png",
        "=bad.jpg",
        "more.zip::inner/third.png",
    ]
    assert [row.status for row in state.rows] == ["ok", "ok", "not_an_image", "ok"]
    expected = digit_bundles[0].predict([first, second])
    assert [row.label for row in state.rows[:2]] == [prediction.label for prediction in expected]
    assert state.rows[0].confidence == pytest.approx(expected[0].confidence, rel=1e-6)
    assert state.rows[3].label == state.rows[1].label
    assert sum(state.skipped.reasons.values()) == 1
    confidences = [entry.row.confidence for entry in state.uncertain]
    assert confidences == sorted(confidences)
    table = pq.read_table(write_table(state.rows, tmp_path / "out", "parquet"))
    assert table.column("status").to_pylist() == ["ok", "ok", "not_an_image", "ok"]
    with open(write_table(state.rows, tmp_path / "out", "csv"), newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)][2] == "'=bad.jpg"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "predictions.csv",
        "predictions.parquet",
    ]


def test_a_batch_shows_progress_and_stops_at_its_limit(demo: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for number in range(50):
            archive.write(save(tmp_path / "x.png", number, (8, 8)), f"{number}.png")
    steps, state = asyncio.run(_classify(demo, [tmp_path / "many.zip"]))
    assert steps == [32, 40]
    assert state.limited
    assert len(state.uncertain) == 12
    worst = sorted(row.confidence for row in state.rows)[:12]
    assert [entry.row.confidence for entry in state.uncertain] == worst


def test_a_zip_of_large_members_is_read_in_bounded_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.demo import batch
    from serve.inputs.items import Skipped

    with zipfile.ZipFile(tmp_path / "large.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(6):
            archive.writestr(f"{number}.png", b"\0" * 1000)
    monkeypatch.setattr(batch, "CHUNK_BYTES", 2500)
    items = batch.read_files([str(tmp_path / "large.zip")], Skipped())
    assert [len(batch.take(items, 32)) for _ in range(3)] == [3, 3, 0]


def drawing(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    paper = np.full((280, 280, 3), 255, np.uint8)
    paper[top:bottom, left:right] = 0
    return paper


def test_a_drawing_is_framed_like_the_samples(
    digit_bundles: tuple[Bundle, Bundle], tiny_bundle: Bundle
) -> None:
    """Wherever and however large it was drawn, the network sees it centred, light on dark,
    as large as its own digits."""
    from serve.demo.samples import drawing_style, frame_drawing

    style = drawing_style(digit_bundles[0])
    assert style is not None
    assert style.light_on_dark
    assert style.extent == pytest.approx(14 / 16)
    small, large = (
        frame_drawing(drawing(10, 20, 30, 90), style),
        frame_drawing(drawing(100, 5, 160, 215), style),
    )
    assert small is not None
    assert large is not None
    assert small.shape == (80, 80, 3)
    assert large.shape == (240, 240, 3)
    rows, columns = np.nonzero(small[..., 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 74, 30, 49)
    assert frame_drawing(np.full((280, 280, 3), 255, np.uint8), style) is None
    assert drawing_style(tiny_bundle) is None


def test_only_a_drawing_is_taken_from_the_pads_event() -> None:
    from serve.demo.drawing_pad import drawing_of

    def event(data: Any) -> Any:
        return SimpleNamespace(_data=data)

    assert drawing_of(event({"drawing": "data:image/png;base64,AAAA"})) == b"\0\0\0"
    for bad in (
        None,
        1,
        {},
        {"drawing": 1},
        {"drawing": "http://x"},
        {"drawing": "data:image/png;base64,!"},
        {"drawing": "/etc/passwd"},
    ):
        assert drawing_of(event(bad)) is None


def test_the_overlay_shows_where_the_evidence_is() -> None:
    from serve.demo.answers import overlay

    pixels, cam = np.full((32, 16, 3), 128, np.uint8), np.zeros((4, 2), np.float32)
    cam[0] = 5
    shown = np.asarray(overlay(pixels, cam)).astype(int)
    assert shown.shape == (320, 160, 3)
    assert (shown[-1] == 128).all()
    assert (shown[0, :, 0] > shown[0, :, 2] + 100).all()  # yellow: much red, little blue
    assert (np.asarray(overlay(pixels, np.full((4, 2), -1, np.float32))) == 128).all()


@pytest.mark.parametrize(("side", "smooth"), [(32, False), (224, True)], ids=["few pixels", "a photograph"])
def test_the_overlay_shows_few_pixels_as_such_and_photographs_smoothly(side: int, smooth: bool) -> None:
    from serve.demo.answers import overlay

    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:, side // 2 :] = 200
    shown = np.asarray(overlay(pixels, np.zeros((7, 7), np.float32)))
    levels = set(shown[..., 0].ravel().tolist())
    assert {0, 200} <= levels
    assert bool(levels - {0, 200}) == smooth


def test_examples_are_one_of_each_class_and_unchanged(
    digit_bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    from serve.demo.samples import pick, write_examples

    golden = digit_bundles[0].golden()
    paths = write_examples(digit_bundles[0], tmp_path / "examples")
    assert [golden.labels[i] for i in pick(golden)] == [0, 1, 2, 3]
    assert (decode(paths[1].read_bytes()).pixels == golden.images[1]).all()


def test_which_model_works_with_and_without_the_exporters_report(
    demo: Any, digit_bundles: tuple[Bundle, Bundle]
) -> None:
    """(That the exporter's own file is read: test_exported.py.)"""
    from serve.demo import reports

    models = list(demo.service.models.values())
    rows = reports.table(models)
    assert [row[0] for row in rows] == ["fused", "branch0"]
    assert rows[0][2] == "–"
    folder = digit_bundles[0].folder.parent
    assert reports.reports(models) == []
    file = {"runtime": "onnxruntime", "file": "model.onnx", "parameters": 1, "multiply_adds": 1}
    artefact = file | {
        "target": "fused",
        "variant": "fp32",
        "bytes": 2_000_000,
        "precision": "fp32 / fp32",
        "parity": "passed",
    }
    measured = {
        "accuracy": 0.9833,
        "accuracy_low": 0.964,
        "accuracy_high": 0.9924,
        "p50_ms": 1.234,
        "p95_ms": 2,
        "pareto": True,
    }
    row = (
        artefact
        | measured
        | {"accuracy_gate": "passed", "images_per_second": 1234.4, "best_batch": 16, "unknown": 1}
    )
    bare = artefact | {"variant": "int8-tensorrt", "accuracy_gate": "not verified here"}
    advice = {
        "artefact": "fused/fp32",
        "reason": "fused/fp32 is <best>.",
        "undecided": ["fused/fp32"],
    }
    try:
        (folder / "report.json").write_text(
            json.dumps({"rows": [row, bare], "limits": {}, "recommendation": advice, "machine": "a box"})
        )
        (report,) = reports.reports(models)
        assert (report.advice, report.machine, report.picture) == ("fused/fp32 is <best>.", "a box", None)
        # Both tiny bundles say that their target is fused.
        assert report.rows[0] == [
            "fused / fp32", "fused, branch0", "98.33%", "96.40 to 99.24%", "level with the best",
            "1.23 / 2.00", "1,234 (16)", "2.00", "passed",
        ]  # fmt: skip
        assert report.rows[1] == [
            "fused / int8-tensorrt", "", "–", "", "", "–", "–", "2.00",
            "logits passed, accuracy not verified here",
        ]  # fmt: skip
        Image.new("RGB", (4, 4)).save(folder / "report.png")
        assert reports.reports(models)[0].picture == folder / "report.png"
        (folder / "report.json").write_text('{"rows": 1}')
        assert reports.reports(models) == []
    finally:
        for name in ("report.png", "report.json"):
            (folder / name).unlink(missing_ok=True)
    assert reports.card(digit_bundles[0]).startswith("# A bundle")


def test_the_page_brings_everything_along(demo: Any) -> None:
    """No script, style, font or image from elsewhere: what the page loads is relative or its own."""
    page = httpx.get(demo.url).text
    loaded = [
        part.split('"', 1)[0]
        for mark in (' src="', '<link rel="stylesheet" href="')
        for part in page.split(mark)[1:]
    ]
    assert loaded
    assert [url for url in loaded if "//" in url.replace(demo.url, "")] == []


def test_an_upload_that_breaks_off_leaves_no_file(demo: Any) -> None:
    import socket
    import time

    from serve.demo.guard import upload_folder

    before = {path for path in upload_folder().rglob("*") if path.is_file()}
    host, port = demo.address.split(":")
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n' + b"x" * 200_000
    with socket.create_connection((host, int(port))) as connection:
        head = (
            "POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; "
            "boundary=b\r\n"
        )
        connection.sendall(f"{head}Content-Length: 9000000\r\n\r\n".encode() + part)
        time.sleep(0.3)
    deadline = time.monotonic() + 60
    while {
        path for path in upload_folder().rglob("*") if path.is_file()
    } != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {path for path in upload_folder().rglob("*") if path.is_file()} == before


def test_building_the_page_leaves_no_event_loop_open(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio's locks make one each, with two sockets, where none runs; warned of in mid-`ast.parse`,
    they break CPython 3.11."""
    from serve.demo.page import mounted

    made: list[asyncio.AbstractEventLoop] = []
    new = asyncio.new_event_loop
    for module in (asyncio, asyncio.events, asyncio.runners.events):
        monkeypatch.setattr(module, "new_event_loop", lambda: made.append(new()) or made[-1])

    async def body() -> list[bool]:
        async with mounted(demo.service):
            return [loop.is_closed() for loop in made if loop is not asyncio.get_running_loop()]

    assert asyncio.run(body()) == [True]


def test_what_gradio_keeps_of_its_sessions_is_bounded(demo: Any, tmp_path: Path) -> None:
    """Every call without a session makes one, of 76 KB; Gradio alone would keep 10,000,
    and their finished queues for ever."""
    from gradio.routes import App
    from starlette.routing import Mount

    from serve.demo.page import mounted
    from serve.demo.sessions import forget_finished

    content = save(tmp_path / "photo.png").read_bytes()

    async def call(http: httpx.AsyncClient) -> str:
        (path,) = (await http.post("/gradio_api/upload", files={"files": ("x.png", content)})).json()
        reference = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = (await http.post("/gradio_api/call/classify", json={"data": [reference]})).json()["event_id"]
        return (await http.get(f"/gradio_api/call/classify/{event}")).text

    async def body() -> None:
        async with mounted(demo.service) as app:
            (gradio,) = [
                route.app for route in app.routes if isinstance(route, Mount) and isinstance(route.app, App)
            ]
            queue = gradio.get_blocks()._queue
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://127.0.0.1"
            ) as http:
                answers = [await call(http) for _ in range(6)]
                waiting = (await http.post("/gradio_api/call/classify", json={"data": [None]})).json()[
                    "event_id"
                ]
                forget_finished(gradio.get_blocks())
                assert all("event: complete" in answer for answer in answers)
                assert len(gradio.state_holder.session_data) == 4
                assert len(queue.event_analytics) == 1
                assert queue.cached_event_analytics_summary == {"functions": {}}
                assert set(queue.pending_event_ids_session) == {waiting}, (
                    "an answer that is still waited for was forgotten"
                )
                assert set(queue.pending_messages_per_session) == {waiting}
                assert "Give an image file" in (await http.get(f"/gradio_api/call/classify/{waiting}")).text

    asyncio.run(body())


def test_the_heading_says_what_each_target_is() -> None:
    assert kind_of("cascade") == "a small network first, the strong one where that is unsure"
    assert kind_of("fused") == "the strong one, which joins small networks"
    assert kind_of("branch1") == "a small network by itself"
