"""What Triton's clients expect beside inference: compression, statistics, configuration, and a plain word
where there is something that they do not get."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import zlib
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ffl_deploy.bundle import Bundle
from serve.server.compression import Compress
from serve.server.settings import Limits, ModelSpec, Settings

Two = tuple[Bundle, Bundle]
PACKED = gzip.compress(b"{}", mtime=0)  # without the time, which would be part of the tests' names
PACKED_TWICE = gzip.compress(PACKED, mtime=0)


def request_of(bundle: Bundle, count: int) -> dict[str, Any]:
    size = bundle.preprocessing
    images = np.random.default_rng(count).integers(0, 256, (count, size.height, size.width, 3), np.uint8)
    tensor = {"name": "images", "shape": images.shape, "datatype": "UINT8", "data": images.ravel().tolist()}
    return {"inputs": [tensor]}


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_may_compress(algorithm: str, binary: bool, server: Any, two_bundles: Two) -> None:
    from tritonclient import http as triton

    bundle = two_bundles[0]
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    tensor = triton.InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    outputs = [triton.InferRequestedOutput("logits", binary_data=binary)]
    with contextlib.closing(triton.InferenceServerClient(server.address)) as client:
        plain = client.infer(bundle.name, [tensor], outputs=outputs)
        packed = client.infer(
            bundle.name,
            [tensor],
            outputs=outputs,
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
    assert packed.as_numpy("logits").tobytes() == plain.as_numpy("logits").tobytes()


def test_large_answers_are_compressed_for_who_asks(server: Any, two_bundles: Two) -> None:
    url, content = f"{server.url}/v2/models/fused/infer", json.dumps(request_of(two_bundles[0], 64))
    plain = httpx.post(url, content=content, headers={"accept-encoding": "identity"})
    packed = httpx.post(url, content=content, headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in plain.headers
    if len(plain.content) >= 16 * 1024:
        assert packed.headers["content-encoding"] == "gzip"
    assert packed.json()["outputs"] == plain.json()["outputs"]
    small = httpx.get(f"{server.url}/v2/models/fused", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in small.headers


@pytest.mark.parametrize(
    ("method", "accepted", "said"),
    [
        ("POST", None, {}),
        ("POST", "gzip", {"content-encoding": "gzip", "vary": "Accept-Encoding"}),
        ("POST", "identity", {"vary": "Accept-Encoding"}),
        ("GET", None, {"vary": "Accept-Encoding"}),  # a cache may keep it for somebody who asks otherwise
    ],
)
def test_what_a_large_answer_says_of_its_compression(
    method: str, accepted: str | None, said: dict[str, str]
) -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(b"a" * 20_000, media_type="text/plain")(scope, receive, send)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(Compress(large))) as client:
            client.headers.clear()  # httpx accepts gzip unless told otherwise
            headers = {} if accepted is None else {"accept-encoding": accepted}
            return await client.request(method, "http://server/", headers=headers)

    answer = asyncio.run(ask())
    assert answer.content == b"a" * 20_000
    found = {name: answer.headers[name] for name in ("content-encoding", "vary") if name in answer.headers}
    assert found == said


@pytest.fixture(scope="module")
def small(two_bundles: Two, start_server: Any) -> Any:
    """A server whose bodies are at most 100 kB."""
    models = (ModelSpec("fused", two_bundles[0].folder),)
    limits = Limits(body_bytes=100_000, bytes_in_flight=400_000)
    with start_server(Settings(models, demo=False, limits=limits)) as running:
        yield running


@pytest.mark.parametrize(
    ("encoding", "content", "status", "words"),
    [
        ("gzip", gzip.compress(b"0" * 50_000_000, mtime=0), 413, "larger than 100000 bytes"),
        ("deflate", zlib.compress(b"0" * 50_000_000), 413, "larger than 100000 bytes"),
        ("gzip", PACKED[:-3], 400, "not what its Content-Encoding says"),
        ("gzip", PACKED + b"more", 400, "not what its Content-Encoding says"),
        ("gzip", b"{}", 400, "not what its Content-Encoding says"),
        ("gzip", b"", 400, "not what its Content-Encoding says"),
        ("deflate", PACKED, 400, "not what its Content-Encoding says"),
        ("gzip", PACKED, 400, "not a valid request"),
        ("br", b"{}", 415, "without Content-Encoding"),
        ("gzip, gzip", PACKED_TWICE, 415, "without Content-Encoding"),
    ],
)
def test_what_is_packed_badly_or_unpacks_to_too_much_is_refused(
    encoding: str, content: bytes, status: int, words: str, small: Any
) -> None:
    response = httpx.post(
        f"{small.url}/v2/models/fused/infer", content=content, headers={"content-encoding": encoding}
    )
    assert (response.status_code, words in response.text) == (status, True), response.text


def test_only_the_protocol_takes_packed_bodies(small: Any) -> None:
    response = httpx.post(
        f"{small.url}/gradio_api/upload", content=gzip.compress(b"x"), headers={"content-encoding": "gzip"}
    )
    assert response.status_code == 415


def test_statistics_count_what_was_done(two_bundles: Two, start_server: Any) -> None:
    from tritonclient import http as triton

    models = tuple(ModelSpec(bundle.name, bundle.folder) for bundle in two_bundles)
    with (
        start_server(Settings(models, demo=False, max_batch=4)) as running,
        contextlib.closing(triton.InferenceServerClient(running.address)) as client,
    ):
        (before,) = client.get_inference_statistics("fused")["model_stats"]
        for count in (1, 4, 7):
            images = np.zeros((count, 32, 32, 3), np.uint8)
            tensor = triton.InferInput("images", list(images.shape), "UINT8").set_data_from_numpy(images)
            client.infer("fused", [tensor])
        with pytest.raises(triton.InferenceServerException):
            client.infer("fused", [triton.InferInput("images", [1, 2], "UINT8")])
        (after,) = client.get_inference_statistics("fused", "1")["model_stats"]
        everything = client.get_inference_statistics()["model_stats"]
        config = client.get_model_config("fused")
        extensions = client.get_server_metadata()["extensions"]
    assert (before["inference_count"], before["execution_count"]) == (0, 0)
    assert (after["inference_count"], after["execution_count"]) == (12, 4)
    sizes = {entry["batch_size"]: entry["compute_infer"]["count"] for entry in after["batch_stats"]}
    assert sizes == {1: 1, 3: 1, 4: 2}
    counted = {name: entry["count"] for name, entry in after["inference_stats"].items()}
    assert counted == {
        "success": 3,
        "fail": 1,
        "queue": 3,
        "compute_input": 3,
        "compute_infer": 4,
        "compute_output": 3,
    }
    assert all(after["inference_stats"][name]["ns"] > 0 for name in ("success", "queue", "compute_infer"))
    assert after["last_inference"] > 1_700_000_000_000
    assert [entry["name"] for entry in everything] == ["fused", "branch0"]
    assert config["input"] == [{"name": "images", "data_type": "TYPE_UINT8", "dims": [32, 32, 3]}]
    assert {output["name"] for output in config["output"]} == {"logits", "probabilities"}
    assert config["max_batch_size"] == 64
    assert set(extensions) == {
        "binary_tensor_data",
        "classification",
        "model_configuration",
        "statistics",
    }


def test_shared_memory_is_refused_plainly(server: Any) -> None:
    """With 200 and the data in the body, a client read its own region, which nobody had written."""
    from tritonclient import http as triton

    images = np.zeros((1, 32, 32, 3), np.uint8)
    given = triton.InferInput("images", list(images.shape), "UINT8").set_data_from_numpy(images)
    wanted = triton.InferRequestedOutput("logits")
    wanted.set_shared_memory("region", 400)
    shared = triton.InferInput("images", list(images.shape), "UINT8")
    shared.set_shared_memory("region", 3072)
    with contextlib.closing(triton.InferenceServerClient(server.address)) as client:
        for inputs, outputs in (([given], [wanted]), ([shared], None)):
            with pytest.raises(triton.InferenceServerException, match="shared memory is not supported"):
                client.infer("fused", inputs, outputs=outputs)


def test_a_model_called_stats_does_not_hide_the_statistics(server: Any) -> None:
    assert [entry["name"] for entry in httpx.get(f"{server.url}/v2/models/stats").json()["model_stats"]] == [
        "fused",
        "branch0",
    ]
