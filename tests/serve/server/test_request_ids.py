"""Whose request a log line is about: what a client sent is in the line and in the answer, whatever it was."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from ffl_deploy.bundle import Bundle
from serve.server.logs import JsonFormatter
from serve.server.rpc import messages
from serve.server.settings import ModelSpec, Settings

PIXELS = [0] * 32 * 32 * 3


@pytest.fixture(scope="module")
def running(two_bundles: tuple[Bundle, Bundle], start_server: Any) -> Iterator[Any]:
    models = (ModelSpec("fused", two_bundles[0].folder),)
    with start_server(Settings(models, demo=False, grpc_port=0, access_log=True)) as server:
        yield server


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """`lines(n) -> [the fields of each of n requests' lines]`, as the JSON log has them; each is one line."""
    caplog.set_level("INFO", "ffl.serve")

    def found(count: int = 1) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 60  # a request is logged once it has been answered
        while sum(one.getMessage() == "request" for one in caplog.records) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        texts = [JsonFormatter().format(one) for one in caplog.records if one.getMessage() == "request"]
        assert all(text.isascii() and text.isprintable() for text in texts)
        return [json.loads(text) for text in texts]

    return found


def infer(url: str, id: str, shape: list[int] | None = None, **headers: str) -> httpx.Response:
    tensor = {"name": "images", "shape": shape or [1, 32, 32, 3], "datatype": "UINT8", "data": PIXELS}
    return httpx.post(f"{url}/v2/models/fused/infer", json={"id": id, "inputs": [tensor]}, headers=headers)


def test_both_ids_of_an_inference_are_in_its_line_and_in_its_answer(running: Any, lines: Any) -> None:
    answer = infer(running.url, "body-1", **{"x-request-id": "trace/7f:header=1"})
    assert answer.json()["id"] == "body-1"
    assert answer.headers["x-request-id"] == "trace/7f:header=1"
    (line,) = lines()
    assert (line["id"], line["request_id"], line["status"]) == ("body-1", "trace/7f:header=1", 200)


def test_a_refused_inference_is_logged_with_its_id(running: Any, lines: Any) -> None:
    assert infer(running.url, "wrong-shape", [1, 3, 32, 32]).status_code == 400
    (line,) = lines()
    assert (line["id"], line["status"], line["level"]) == ("wrong-shape", 400, "warning")


@pytest.mark.parametrize(
    "id", ["a\nb", '"}{"level": "x', "\x1b[2J", "\u202e\u2028", "é" * 5000, "\U0001f600" * 200]
)
def test_an_id_of_any_characters_is_escaped_and_cut(running: Any, lines: Any, id: str) -> None:
    answer = infer(running.url, id)
    assert answer.json()["id"] == id
    (line,) = lines()
    assert line["id"] == id[:128]


@pytest.mark.parametrize("sent", [b"has spaces", b"x" * 129, b"caf\xe9", b"tab\there"])
def test_a_header_that_cannot_be_an_id_is_logged_beside_the_servers_own(
    running: Any, lines: Any, sent: bytes
) -> None:
    answer = httpx.get(f"{running.url}/v2", headers={b"x-request-id": sent})
    (line,) = lines()
    assert line["sent_request_id"] == sent.decode("latin-1")[:128]
    assert answer.headers["x-request-id"] == line["request_id"] != line["sent_request_id"]


def test_without_any_the_server_counts(running: Any, lines: Any) -> None:
    first, second = (httpx.get(f"{running.url}/v2").headers["x-request-id"] for _ in range(2))
    assert first != second
    found = lines(2)
    assert [line["request_id"] for line in found] == [first, second]
    assert not any("id" in line or "sent_request_id" in line for line in found)


def test_a_long_path_is_cut(running: Any, lines: Any) -> None:
    httpx.get(f"{running.url}/v2/{'x' * 20_000}")
    (line,) = lines()
    assert line["path"] == "/v2/" + "x" * 1020


def test_a_classified_photograph_carries_the_id_that_came_with_it(
    running: Any, lines: Any, photo: Any
) -> None:
    image = {"content": photo(1), "headers": {"content-type": "image/jpeg", "x-request-id": "shelf-3"}}
    assert httpx.post(f"{running.url}/classify", **image).json()["request_id"] == "shelf-3"
    del image["headers"]["x-request-id"]
    assert "request_id" not in httpx.post(f"{running.url}/classify", **image).json()
    assert lines(2)[0]["request_id"] == "shelf-3"


def test_over_grpc_as_over_http(running: Any, lines: Any) -> None:
    asked = messages.message("ModelInferRequest")(model_name="fused", id="call-1")
    asked.inputs.add(name="images", datatype="UINT8", shape=[1, 32, 32, 3])
    asked.raw_input_contents.append(bytes(PIXELS))
    with grpc.insecure_channel(f"127.0.0.1:{running.service.grpc_port}") as channel:
        ask = channel.unary_unary(f"/{messages.INFERENCE}/ModelInfer")
        answer, done = ask.with_call(asked.SerializeToString(), metadata=(("x-request-id", "a b"),))
    assert messages.message("ModelInferResponse").FromString(answer).id == "call-1"
    (line,) = lines()
    assert (line["id"], line["sent_request_id"]) == ("call-1", "a b")
    assert dict(done.trailing_metadata())["x-request-id"] == line["request_id"]
