"""Bundles that are replaced while a server answers: the old one does until the new one is verified."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ffl_deploy.bundle import Bundle, load_bundle
from serve.server.settings import ModelSpec, Settings

MakeBundle = Callable[..., Bundle]


@pytest.fixture
def folder(tmp_path: Path, make_bundle: MakeBundle) -> Path:
    return make_bundle(tmp_path / "cats").folder


@pytest.fixture
def controlled(folder: Path, start_server: Any) -> Iterator[Any]:
    """A server of one bundle that may be replaced."""
    with start_server(Settings((ModelSpec("cats", folder),), demo=False, model_control=True)) as running:
        yield running


def replace(folder: Path, new: Path) -> None:
    """As an exporter does it: beside its place, then renamed."""
    shutil.move(folder, folder.with_name("before"))
    shutil.move(new, folder)


def logits_of(url: str) -> list[float]:
    images = np.full((1, 32, 32, 3), 70, np.uint8)
    tensor = {"name": "images", "shape": images.shape, "datatype": "UINT8", "data": images.ravel().tolist()}
    response = httpx.post(f"{url}/v2/models/cats/infer", json={"inputs": [tensor]})
    assert response.status_code == 200, response.text
    return response.json()["outputs"][0]["data"]  # type: ignore[no-any-return]


def expected(folder: Path) -> list[float]:
    logits = load_bundle(folder).session().run(np.full((1, 32, 32, 3), 70, np.uint8)).logits
    return logits.ravel().tolist()  # type: ignore[no-any-return]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_tritonclient_unloads_and_loads(controlled: Any) -> None:
    from tritonclient import http as triton
    from tritonclient.utils import InferenceServerException

    with contextlib.closing(triton.InferenceServerClient(controlled.address)) as client:
        assert "model_repository" in client.get_server_metadata()["extensions"]
        client.unload_model("cats")
        assert not client.is_model_ready("cats")
        assert client.get_model_repository_index() == [
            {"name": "cats", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
        ]
        with pytest.raises(InferenceServerException, match="cats is unloaded"):
            client.get_model_metadata("cats")
        client.load_model("cats")
        assert client.is_model_ready("cats")
        assert client.get_model_repository_index() == [{"name": "cats", "version": "1", "state": "READY"}]
        with pytest.raises(InferenceServerException, match="started with cats"):
            client.load_model("dogs")
        with pytest.raises(InferenceServerException, match="cannot be sent along"):
            client.load_model("cats", config="{}")
    metrics = httpx.get(f"{controlled.url}/metrics").text
    assert 'ffl_queue_images{model="cats"} 0.0' in metrics


def test_only_what_is_ready_where_that_is_asked(controlled: Any) -> None:
    url = f"{controlled.url}/v2/repository"
    assert httpx.post(f"{url}/models/cats/unload").json() == {}
    assert httpx.post(f"{url}/index", json={"ready": True}).json() == []
    assert len(httpx.post(f"{url}/index").json()) == 1
    assert httpx.post(f"{url}/index", content=b"[1]").status_code == 400
    assert httpx.post(f"{url}/index", content=b" " * 100_000).status_code == 413


def test_clients_may_change_nothing_unless_it_is_allowed(server: Any) -> None:
    for verb in ("load", "unload"):
        response = httpx.post(f"{server.url}/v2/repository/models/fused/{verb}")
        assert response.status_code == 403
        assert "--model-control" in response.json()["error"]
    assert "model_repository" not in httpx.get(f"{server.url}/v2").json()["extensions"]
    assert httpx.get(f"{server.url}/v2/models/fused/ready").status_code == 200


def test_a_new_bundle_answers_once_it_is_loaded(
    controlled: Any, folder: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    before = logits_of(controlled.url)
    new = make_bundle(tmp_path / "new", classes=("cat", "dog", "frog", "owl"), seed=5)
    wanted = expected(new.folder)
    replace(folder, new.folder)
    assert logits_of(controlled.url) == before
    assert httpx.post(f"{controlled.url}/v2/repository/models/cats/load").status_code == 200
    np.testing.assert_allclose(logits_of(controlled.url), wanted, rtol=1e-4, atol=1e-5)
    described = httpx.get(f"{controlled.url}/v2/models/cats").json()
    assert described["parameters"]["classes"][-1] == "owl"


@pytest.mark.parametrize("fault", ["hash", "answers", "gone"])
def test_a_corrupt_bundle_never_answers(
    fault: str, controlled: Any, folder: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    before = logits_of(controlled.url)
    if fault == "gone":
        shutil.rmtree(folder)
    else:
        new = make_bundle(tmp_path / "new", seed=5, wrong=("fp32",) if fault == "answers" else ())
        if fault == "hash":
            data = bytearray((new.folder / "model.onnx").read_bytes())
            data[len(data) // 2] ^= 1
            (new.folder / "model.onnx").write_bytes(data)
        replace(folder, new.folder)
    response = httpx.post(f"{controlled.url}/v2/repository/models/cats/load")
    assert response.status_code == 400
    assert logits_of(controlled.url) == before
    (entry,) = httpx.post(f"{controlled.url}/v2/repository/index").json()
    assert (entry["state"], entry["reason"]) == ("READY", response.json()["error"])


def test_what_was_asked_of_the_old_one_is_answered_by_it(
    controlled: Any, folder: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    """Eight clients ask without a pause while the bundle is replaced by another, twice."""
    first = logits_of(controlled.url)
    others = [make_bundle(tmp_path / f"new{seed}", seed=seed).folder for seed in (5, 6)]
    known = [first, *map(expected, others)]
    answers, ended = list[list[float]](), threading.Event()

    def ask() -> None:
        while not ended.is_set():
            answers.append(logits_of(controlled.url))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for other in others:
            shutil.rmtree(folder)
            shutil.copytree(other, folder)
            httpx.post(f"{controlled.url}/v2/repository/models/cats/load").raise_for_status()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not [one for one in answers if not any(np.allclose(one, two, rtol=1e-3) for two in known)]
    np.testing.assert_allclose(logits_of(controlled.url), known[-1], rtol=1e-4, atol=1e-5)
    wait_until(lambda: sum(t.name.startswith("batcher-cats") for t in threading.enumerate()) <= 2)


def test_watching_replaces_what_changed_and_says_once_what_it_refuses(
    folder: Path, tmp_path: Path, make_bundle: MakeBundle, start_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings((ModelSpec("cats", folder),), demo=False, watch_seconds=0.1)
    with start_server(settings) as running:
        before = logits_of(running.url)
        bad = make_bundle(tmp_path / "bad", seed=7, wrong=("fp32",))
        replace(folder, bad.folder)

        def refusals() -> int:
            return sum("is refused" in record.message for record in caplog.records)

        wait_until(lambda: refusals() > 0)
        time.sleep(0.5)
        assert refusals() == 1
        assert logits_of(running.url) == before
        shutil.rmtree(folder)
        good = make_bundle(tmp_path / "good", seed=8)
        wanted = expected(good.folder)
        shutil.copytree(good.folder, folder)
        wait_until(lambda: logits_of(running.url) != before)
        np.testing.assert_allclose(logits_of(running.url), wanted, rtol=1e-4, atol=1e-5)


def test_a_hangup_without_a_terminal_looks_for_replaced_bundles(
    folder: Path, tmp_path: Path, make_bundle: MakeBundle, serve_process: Any
) -> None:
    with serve_process(str(folder), "--no-demo") as running:
        before = logits_of(running.url)
        new = make_bundle(tmp_path / "new", seed=5)
        wanted = expected(new.folder)
        replace(folder, new.folder)
        running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: logits_of(running.url) != before)
        np.testing.assert_allclose(logits_of(running.url), wanted, rtol=1e-4, atol=1e-5)
        lines = [json.loads(line) for line in running.read_log().splitlines()]
        assert [line["signal"] for line in lines if line["message"].startswith("looking")] == ["SIGHUP"]
        running.process.terminate()
        assert running.process.wait(30) == 0
