"""`/v2` as real clients use it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle
from ffl_deploy.images import decode, prepare
from ffl_deploy.runtime import Session
from serve.server.settings import Limits, ModelSpec, Settings
from tests.serve.asking import json_request, pixels_of, wait_until

Start = Callable[..., contextlib.AbstractContextManager[Any]]


def png(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def session_of(server: Any, bundle: Bundle) -> Session:
    """-> the session that serves `bundle`: one with another number of threads may differ in the last bit."""
    return server.service.models[bundle.name].session  # type: ignore[no-any-return]


def test_tritonclient_speaks_to_it_and_gets_the_bits_of_the_session(
    server: Any, two_bundles: tuple[Bundle, Bundle]
) -> None:
    """The official client, with its defaults (binary tensors, no JSON content type),
    for every model and batch size."""
    from tritonclient import http as triton

    with contextlib.closing(triton.InferenceServerClient(server.address)) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.get_server_metadata()["extensions"][0] == "binary_tensor_data"
        assert {model["name"] for model in client.get_model_repository_index()} == {"fused", "branch0"}
        for bundle in two_bundles:
            assert client.is_model_ready(bundle.name)
            assert client.is_model_ready(bundle.name, "1")
            metadata = client.get_model_metadata(bundle.name)
            assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
            session, independent = session_of(server, bundle), bundle.session()
            for count in (1, 2, 7, 32):
                images = pixels_of(bundle, count)
                tensor = triton.InferInput("images", list(images.shape), "UINT8").set_data_from_numpy(images)
                result = client.infer(bundle.name, [tensor], request_id="r1")
                expected = session.run(images)
                assert result.get_response()["id"] == "r1"
                assert result.as_numpy("logits").tobytes() == expected.logits.tobytes()
                assert result.as_numpy("probabilities").tobytes() == expected.probabilities.tobytes()
                np.testing.assert_allclose(
                    expected.logits, independent.run(images).logits, rtol=1e-4, atol=1e-5
                )
        wanted = [triton.InferRequestedOutput("probabilities", class_count=2)]
        labels = client.infer("fused", [tensor], outputs=wanted).as_numpy("probabilities")
        best = two_bundles[0].classes[int(two_bundles[0].session().run(images).probabilities[0].argmax())]
        assert labels.shape == (32, 2)
        assert labels[0, 0].decode().endswith(f":{best}")


def test_encoded_files_are_decoded_as_ffl_predict_decodes_them(
    server: Any, two_bundles: tuple[Bundle, Bundle]
) -> None:
    from tritonclient import http as triton

    files = [png(1), png(2, (200, 100))]
    bundle = two_bundles[0]
    expected = session_of(server, bundle).run(
        np.stack([prepare(decode(file).pixels, bundle.preprocessing) for file in files])
    )
    with contextlib.closing(triton.InferenceServerClient(server.address)) as client:
        tensor = triton.InferInput("encoded", [2], "BYTES").set_data_from_numpy(
            np.array(files, dtype=np.object_)
        )
        result = client.infer("fused", [tensor])
    assert result.as_numpy("logits").tobytes() == expected.logits.tobytes()


def test_json_request_and_response(server: Any, two_bundles: tuple[Bundle, Bundle]) -> None:
    images = pixels_of(two_bundles[0], 2)
    response = httpx.post(f"{server.url}/v2/models/fused/versions/1/infer", json=json_request(images, id="a"))
    answer = response.json()
    assert response.status_code == 200
    assert answer["id"] == "a"
    outputs = {output["name"]: output for output in answer["outputs"]}
    expected = session_of(server, two_bundles[0]).run(images)
    assert np.float32(outputs["logits"]["data"]).tobytes() == expected.logits.tobytes()
    assert outputs["probabilities"]["shape"] == [2, 3]


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "says"),
    [
        ("POST", "/v2/models/fused/infer", b"{}", 400, "not a valid request"),
        ("POST", "/v2/models/fused/infer", b"", 400, "not a valid request"),
        ("POST", "/v2/models/other/infer", b"{}", 404, "no such model; this server has fused, branch0"),
        ("POST", "/v2/models/fused/versions/2/infer", b"{}", 404, "no such model"),
        ("GET", "/v2/models/fused/infer", None, 405, "Method Not Allowed"),
        ("GET", "/v2/models", None, 404, "no such route"),
        ("GET", "/v2/models/fused/../../../etc/passwd", None, 404, ""),
        ("POST", "/", b"{}", 200, "ffl-serve"),
        ("GET", "/gradio_api/info", None, 404, "nothing here"),
    ],
)
def test_every_refusal_is_json_with_its_reason(
    server: Any, method: str, path: str, content: bytes | None, status: int, says: str
) -> None:
    response = httpx.request(method, server.url + path, content=content)
    assert response.status_code == status
    assert says in response.text
    assert response.headers["content-type"] == "application/json"
    assert "traceback" not in response.text.lower()


@pytest.mark.parametrize(
    ("file", "code"),
    [
        (b"", "empty"),
        (b"<html>", "not_an_image"),
        (png()[:500], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "unsupported"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported"),
    ],
)
def test_a_bad_image_is_refused_with_its_code(server: Any, file: bytes, code: str) -> None:
    tensor = {
        "name": "encoded",
        "shape": [2],
        "datatype": "BYTES",
        "data": [base64.b64encode(f).decode() for f in (png(), file)],
    }
    response = httpx.post(f"{server.url}/v2/models/fused/infer", json={"inputs": [tensor]})
    assert (response.status_code, response.json()["code"]) == (400, code)


def test_bad_images_leave_the_good_ones_beside_them_unharmed(
    server: Any, two_bundles: tuple[Bundle, Bundle]
) -> None:
    """Bad input 35."""
    from tritonclient import http as triton

    images = pixels_of(two_bundles[0], 1)
    good = triton.InferInput("images", [1, 32, 32, 3], "UINT8").set_data_from_numpy(images)
    bad = triton.InferInput("encoded", [1], "BYTES").set_data_from_numpy(
        np.array([b"not an image"], dtype=np.object_)
    )
    expected = two_bundles[0].session().run(images).logits
    with contextlib.closing(triton.InferenceServerClient(server.address, concurrency=8)) as client:
        pending = [client.async_infer("fused", [bad if i % 2 else good]) for i in range(16)]
        for i, request in enumerate(pending):
            if i % 2:
                with pytest.raises(triton.InferenceServerException, match="not one of"):
                    request.get_result()
            else:
                np.testing.assert_allclose(request.get_result().as_numpy("logits"), expected, rtol=1e-5)


def test_nan_logits_are_an_error_of_their_request_only(
    make_bundle: Callable[..., Bundle], tmp_path: Path, start_server: Start
) -> None:
    bundle = make_bundle(tmp_path / "nan", nonfinite_above=200.0)
    dark, white = np.zeros((1, 32, 32, 3), np.uint8), np.full((1, 32, 32, 3), 255, np.uint8)
    with (
        start_server(Settings((ModelSpec("nan", bundle.folder),), demo=False)) as running,
        httpx.Client() as client,
    ):
        url = f"{running.url}/v2/models/nan/infer"
        assert client.post(url, json=json_request(dark)).status_code == 200
        response = client.post(url, json=json_request(np.concatenate([dark, white])))
        assert response.status_code == 500
        assert response.json() == {
            "error": "nan gave NaN or infinite values for image 1",
            "code": "nonfinite",
        }
        assert client.post(url, json=json_request(dark)).status_code == 200


def test_metrics_count_images_batches_and_refusals(server: Any, two_bundles: tuple[Bundle, Bundle]) -> None:
    def value(line: str) -> float:
        text = httpx.get(f"{server.url}/metrics").text
        return next((float(row.rsplit(" ", 1)[1]) for row in text.splitlines() if row.startswith(line)), 0.0)

    images, ok = 'ffl_images_total{model="branch0"}', 'ffl_requests_total{route="infer",status="200"}'
    before = value(images), value(ok), value('ffl_requests_total{route="infer",status="400"}')
    url = f"{server.url}/v2/models/branch0/infer"
    httpx.post(url, json=json_request(pixels_of(two_bundles[1], 5)))
    httpx.post(url, content=b"?")
    assert (value(images), value(ok), value('ffl_requests_total{route="infer",status="400"}')) == tuple(
        number + step for number, step in zip(before, (5, 1, 1), strict=True)
    )
    assert value("ffl_ready") == 1


def test_overload_is_refused_at_once_with_exact_counts(
    two_bundles: tuple[Bundle, Bundle], start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request runs, two wait, the queue is then full: of eleven exactly eight are refused,
    and none of them waits."""
    bundle = two_bundles[0]
    limits = Limits(queued_images=2)
    with start_server(
        Settings((ModelSpec("fused", bundle.folder),), demo=False, workers=1, limits=limits)
    ) as running:
        model = running.service.models["fused"]
        release, entered = threading.Event(), threading.Event()
        run = model.batcher._run

        def held(images: np.ndarray) -> Any:
            entered.set()
            assert release.wait(120)
            return run(images)

        monkeypatch.setattr(model.batcher, "_run", held)
        url = f"{running.url}/v2/models/fused/infer"
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(url, json=json_request(pixels_of(bundle, 1)), timeout=120))

        first = threading.Thread(target=ask)
        first.start()
        assert entered.wait(60)
        others = [threading.Thread(target=ask) for _ in range(10)]
        for thread in others:
            thread.start()
        deadline = time.monotonic() + 60
        while len(answers) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [answer.status_code for answer in answers] == [503] * 8
        assert answers[0].headers["retry-after"] == "1"
        release.set()
        for thread in [first, *others]:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [503] * 8


def test_a_client_that_goes_away_frees_its_place(
    two_bundles: tuple[Bundle, Bundle], start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad input 34."""
    bundle = two_bundles[0]
    with start_server(Settings((ModelSpec("fused", bundle.folder),), demo=False, workers=1)) as running:
        batcher = running.service.models["fused"].batcher
        release, entered = threading.Event(), threading.Event()
        ran: list[int] = []
        run = batcher._run

        def held(images: np.ndarray) -> Any:
            entered.set()
            assert release.wait(120)
            ran.append(len(images))
            return run(images)

        monkeypatch.setattr(batcher, "_run", held)
        url = f"{running.url}/v2/models/fused/infer"
        first = threading.Thread(
            target=httpx.post,
            args=(url,),
            kwargs={"json": json_request(pixels_of(bundle, 1)), "timeout": 120},
        )
        first.start()
        assert entered.wait(60)
        body = json.dumps(json_request(pixels_of(bundle, 9))).encode()
        host, port = running.address.split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = (
                "POST /v2/models/fused/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: "
                f"{len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            wait_until(lambda: batcher.waiting_images == 9)
        wait_until(lambda: batcher.waiting_images == 0)
        release.set()
        first.join()
        assert ran == [1]
