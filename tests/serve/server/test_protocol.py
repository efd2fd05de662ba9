"""The wire format, against the specification's own forms and against hostile ones."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.server import v2
from serve.server.protocol import (
    InferRequest,
    ProtocolError,
    RequestedOutput,
    Signature,
    read_request,
    write_response,
)

SIGNATURE = Signature(
    "fused",
    2,
    3,
    ["cat", "dog", "frog"],
    {"logits": [3], "probabilities": [3]},
    max_images=4,
    platform="onnxruntime",
)
PIXELS = np.arange(36, dtype=np.uint8).reshape(2, 2, 3, 3)


def body(tensor: dict[str, Any] | None = None, **fields: Any) -> bytes:
    described = {"name": "images", "shape": [2, 2, 3, 3], "datatype": "UINT8", "data": PIXELS.tolist()} | (
        tensor or {}
    )
    described = {key: value for key, value in described.items() if value is not None}
    return json.dumps({"inputs": [described], **fields}).encode()


def binary(size: Any = 36, raw: bytes = PIXELS.tobytes(), **tensor: Any) -> tuple[bytes, int]:
    header = body({"data": None, "parameters": {"binary_data_size": size}} | tensor)
    return header + raw, len(header)


def test_json_binary_nested_and_flat_forms_give_the_same_pixels() -> None:
    forms = [(body(), None), (body({"data": PIXELS.ravel().tolist()}), None), binary()]
    for content, length in forms:
        request = read_request(content, length, SIGNATURE)
        assert request.images is not None
        assert request.images.dtype == np.uint8
        assert (request.images == PIXELS).all()
        assert [output.name for output in request.outputs] == ["logits", "probabilities"]


def test_encoded_files_in_both_forms() -> None:
    files = [b"\xff\xd8 first", b""]
    raw = b"".join(struct.pack("<I", len(file)) + file for file in files)
    tensor = {"name": "encoded", "shape": [2], "datatype": "BYTES"}
    content, length = binary(len(raw), raw, **tensor)
    assert read_request(content, length, SIGNATURE).encoded == files
    content = body({**tensor, "data": [base64.b64encode(file).decode() for file in files]})
    assert read_request(content, None, SIGNATURE).encoded == files


@pytest.mark.parametrize(
    ("content", "length", "says"),
    [
        (b"", None, "not a valid request"),
        (b"[" * 100_000, None, "nested too deeply|not a valid request"),
        (b'{"inputs": []}', None, "exactly one input"),
        (body({"name": "pixels"}), None, "takes 'images' or 'encoded'"),
        (body({"datatype": "FP32"}), None, "has to be UINT8"),
        (body({"shape": [2, 3, 2, 3]}), None, r"shape \[n, 2, 3, 3\]"),
        (body({"shape": [0, 2, 3, 3]}), None, "n >= 1"),
        (body({"shape": []}), None, "n >= 1"),
        (body({"shape": [5, 2, 3, 3]}), None, "at most 4 images"),
        (body({"shape": [10**30, 2, 3, 3]}), None, "at most 4 images|not a valid request"),
        (body({"data": [0.5] * 36}), None, "whole numbers from 0 to 255"),
        (body({"data": [True] * 36}), None, "not an array of numbers"),
        (body({"data": [True] + [1] * 35}), None, "not an array of numbers"),
        (body({"data": [256] * 36}), None, "whole numbers from 0 to 255"),
        (body({"data": [-1] * 36}), None, "whole numbers from 0 to 255"),
        (body({"data": ["a"] * 36}), None, "whole numbers"),
        (body({"data": [[1], [1, 2]]}), None, "does not have the 36 values"),
        (body({"data": [[[1] * 9] * 3, [[1] * 9]]}), None, "not an array of numbers"),
        (body({"data": [1] * 35}), None, "36 values"),
        (body({"data": None}), None, "neither data nor"),
        (body({"parameters": {"binary_data_size": 36}}), None, "both data and"),
        (
            body({"data": None, "parameters": {"binary_data_size": 36}}),
            None,
            "inference-header-content-length",
        ),
        (body() + b"xx", len(body()), "no input has the parameter"),
        (*binary(35), "36 bytes behind"),
        (*binary("36"), "36 bytes behind"),
        (*binary(35, PIXELS.tobytes()[:35]), "its shape needs 36"),
        (body(), 10**6, "but the body has"),
        (body(), -1, "but the body has"),
        (body(outputs=[{"name": "secret"}]), None, "gives logits, probabilities"),
        (body(outputs=[{"name": "logits"}, {"name": "logits"}]), None, "twice"),
        (body({"name": "encoded", "shape": [1], "datatype": "BYTES", "data": ["!"]}), None, "base64"),
        (*binary(3, b"\x01\x00\x00", name="encoded", shape=[1], datatype="BYTES"), "middle of an element"),
        (
            *binary(4, b"\x09\x00\x00\x00", name="encoded", shape=[1], datatype="BYTES"),
            "middle of an element",
        ),
        (
            *binary(4, b"\x00\x00\x00\x00", name="encoded", shape=[2], datatype="BYTES"),
            "1 elements, its shape says 2",
        ),
    ],
)
def test_a_malformed_request_is_refused_with_its_reason(
    content: bytes, length: int | None, says: str
) -> None:
    with pytest.raises(ProtocolError, match=says):
        read_request(content, length, SIGNATURE)


def test_an_error_never_repeats_what_was_sent() -> None:
    secret = "s3cret" * 10
    for content in (
        body({"name": secret}),
        body({"datatype": secret}),
        body({"data": secret}),
        body(outputs=[{"name": secret}]),
    ):
        with pytest.raises(ProtocolError) as raised:
            read_request(content, None, SIGNATURE)
        assert "s3cret" not in str(raised.value)


# the same examples everywhere, and no limit that a busy machine breaks
@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.none() | st.integers(-5, 250))
def test_any_bytes_give_a_request_or_a_protocol_error(content: bytes, length: int | None) -> None:
    try:
        read_request(content, length, SIGNATURE)
    except ProtocolError:
        return


RESULTS = {
    "logits": np.array([[1.5, 0.1, -2], [0, 0, 7]], np.float32),
    "probabilities": np.array([[0.7, 0.2, 0.1], [0, 0, 1]], np.float32),
}


def request(*outputs: RequestedOutput, id: str = "", binary: bool = False) -> InferRequest:
    return InferRequest(id, PIXELS, [], list(outputs), binary)


def test_a_json_response_keeps_every_bit_of_the_values() -> None:
    parts, length = write_response(SIGNATURE, request(RequestedOutput("logits"), id="7"), RESULTS)
    answer = json.loads(b"".join(parts))
    assert length is None
    assert answer["id"] == "7"
    assert answer["model_name"] == "fused"
    assert answer["outputs"][0]["shape"] == [2, 3]
    assert np.float32(answer["outputs"][0]["data"]).tobytes() == RESULTS["logits"].tobytes()


def test_binary_outputs_follow_the_header_in_order() -> None:
    outputs = [RequestedOutput("probabilities", {"binary_data": True}), RequestedOutput("logits")]
    parts, length = write_response(SIGNATURE, request(*outputs), RESULTS)
    content = b"".join(parts)
    header = json.loads(content[:length])
    assert header["outputs"][0]["parameters"] == {"binary_data_size": 24}
    assert "data" not in header["outputs"][0]
    assert header["outputs"][1]["data"] == RESULTS["logits"].ravel().tolist()
    assert content[length:] == RESULTS["probabilities"].tobytes()


def test_classification_gives_the_largest_values_with_their_labels() -> None:
    output = RequestedOutput("logits", {"classification": 2})
    parts, _ = write_response(SIGNATURE, request(output), RESULTS)
    described = json.loads(parts[0])["outputs"][0]
    assert described["data"] == ["1.500000:0:cat", "0.100000:1:dog", "7.000000:2:frog", "0.000000:0:cat"]
    assert described["shape"] == [2, 2]
    assert described["datatype"] == "BYTES"
    with pytest.raises(ProtocolError, match="whole number"):
        write_response(SIGNATURE, request(RequestedOutput("logits", {"classification": "x"})), RESULTS)


def test_classification_of_features_is_refused() -> None:
    """They would be named by classes, or lack one."""
    output = RequestedOutput("embedding", {"classification": 2})
    with pytest.raises(ProtocolError, match="classification is defined for logits and probabilities"):
        write_response(SIGNATURE, request(output), {"embedding": np.zeros((2, 3), np.float32)})


def test_a_length_of_thousands_of_digits_is_refused() -> None:
    """Python's int() has a limit of its own, which is no answer to a client."""
    scope = {"headers": [(b"inference-header-content-length", b"1" * 5000)]}
    with pytest.raises(ProtocolError, match="has to be a whole number"):
        v2._header_length(scope)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (body({"data": [[]] * 100_000}), "does not have the 36 values"),
        (body({"data": [{}] * 100_000}), "more objects or fields"),
        (body({"data": [{}] * 36}), "not an array of numbers"),
        (body({"data": [[[[[]]]]] * 36}), "does not have the 36 values"),
        (body({"shape": [1] * 1000}), "shape of input"),
        (body({"shape": "x"}), "shape of input"),
        (body({"parameters": {str(i): 1 for i in range(5000)}}), "more objects or fields"),
        (body({"parameters": {"a": [1]}}), "not a valid request"),
        (body(outputs=[{"name": "logits"}] * 2000), "more objects or fields"),
        (
            body({"name": "encoded", "shape": [1], "datatype": "BYTES", "data": [""] * 10_000}),
            "more elements than the 1",
        ),
        (body(extra=[{}] * 2000), "more objects or fields"),
    ],
)
def test_what_would_be_slow_to_parse_is_refused_before(
    content: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight MiB of empty lists stopped every other answer for seven seconds."""
    parse = msgspec.json.decode

    def small_parse(data: bytes, **options: Any) -> Any:
        assert len(data) < 2000, "what is large is looked at before it is parsed"
        return parse(data, **options)

    monkeypatch.setattr(msgspec.json, "decode", small_parse)
    with pytest.raises(ProtocolError, match=says):
        read_request(content, None, SIGNATURE)
