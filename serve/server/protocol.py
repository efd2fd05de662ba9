"""Open Inference Protocol v2, apart from HTTP: bodies -> requests, results -> bodies.

Source: https://github.com/kserve/open-inference-protocol (REST) with Triton's binary tensor and
classification extensions, which `tritonclient.http` uses by default.

A request carries exactly one input:
    images    UINT8 [n, height, width, 3]: pixels that have the network's size already
    encoded   BYTES [n]: whole image files; the server decodes and resizes them (in JSON: base64 strings)
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from serve.server.noted import note

IMAGES, ENCODED = "images", "encoded"
HEADER_LENGTH = "inference-header-content-length"
DATATYPES = {"set": "BOOL", "abstain": "BOOL", "unfamiliar": "BOOL", "exit": "INT64"}
"""Of outputs; all others are FP32."""
VERSION = "1"  # a bundle is immutable; a new export is served under a new name or by a restart

Parameters = dict[str, str | int | float | bool]

# A request has one input and a few outputs: more than these in its JSON part is no request. Counted before it
# is parsed, which takes 30 times its size where it is all braces, and stops every other answer meanwhile.
MAX_OBJECTS, MAX_KEYS, MAX_SHAPE_BYTES = 1000, 4000, 200


class ProtocolError(Exception):
    """The request cannot be answered; the text says why and never repeats what was sent."""


class Tensor(msgspec.Struct):
    """An input as the client describes it."""

    name: str
    datatype: str
    raw_shape: msgspec.Raw = msgspec.field(name="shape")
    parameters: Parameters = {}
    data: msgspec.Raw = msgspec.Raw(b"")

    @property
    def shape(self) -> list[int]:
        """Raises ProtocolError where it is none."""
        text = bytes(self.raw_shape)
        try:
            if len(text) > MAX_SHAPE_BYTES:
                raise ValueError
            return msgspec.json.decode(text, type=list[int])
        except (msgspec.DecodeError, ValueError) as error:
            raise ProtocolError(f"the shape of input {self.name!r} is no list of whole numbers") from error


class RequestedOutput(msgspec.Struct):
    name: str
    parameters: Parameters = {}


class Header(msgspec.Struct):
    """The JSON part of a request. Fields of extensions that are not known here are ignored,
    as the protocol asks."""

    inputs: list[Tensor]
    id: str = ""
    parameters: Parameters = {}
    outputs: list[RequestedOutput] | None = None


@dataclass(frozen=True)
class InferRequest:
    """A checked request: either `images`, uint8 [n, height, width, 3], or `encoded`, n image files."""

    id: str
    images: np.ndarray | None
    encoded: list[bytes]
    outputs: list[RequestedOutput]
    binary_by_default: bool

    @property
    def count(self) -> int:
        return len(self.encoded) if self.images is None else len(self.images)


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives. `outputs`: name -> shape behind the batch dimension."""

    name: str
    height: int
    width: int
    classes: Sequence[str]
    outputs: Mapping[str, Sequence[int]]
    max_images: int
    platform: str

    def metadata(self) -> dict[str, Any]:
        """-> the answer to GET /v2/models/NAME."""
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": self.platform,
            "inputs": [{"name": IMAGES, "datatype": "UINT8", "shape": [-1, self.height, self.width, 3]}],
            "outputs": [
                {"name": name, "datatype": datatype_of(name), "shape": [-1, *shape]}
                for name, shape in self.outputs.items()
            ],
            "parameters": {
                "max_images": self.max_images,
                "color": "RGB",
                "classes": list(self.classes),
                "alternative_input": {"name": ENCODED, "datatype": "BYTES", "shape": [-1]},
            },
        }

    def config(self, max_batch: int) -> dict[str, Any]:
        """-> the answer to GET /v2/models/NAME/config: what Triton's model configuration says of it."""
        return {
            "name": self.name,
            "platform": self.platform,
            "backend": "ffl-serve",
            "max_batch_size": self.max_images,
            "input": [{"name": IMAGES, "data_type": "TYPE_UINT8", "dims": [self.height, self.width, 3]}],
            "output": [
                {"name": name, "data_type": f"TYPE_{datatype_of(name)}", "dims": list(shape)}
                for name, shape in self.outputs.items()
            ],
            "dynamic_batching": {"preferred_batch_size": [max_batch], "max_queue_delay_microseconds": 0},
        }


def datatype_of(output: str) -> str:
    """-> the protocol's name for what an output's values are."""
    return DATATYPES.get(output, "FP32")


_decode_header = msgspec.json.Decoder(Header).decode
_encode_header = msgspec.json.Encoder().encode


def read_request(body: bytes, header_length: int | None, signature: Signature) -> InferRequest:
    """Parse and check a request.

    Args: header_length: bytes of the JSON part when raw tensors follow it, else None.
    Raises ProtocolError.
    """
    if header_length is not None and not 0 <= header_length <= len(body):
        raise ProtocolError(f"{HEADER_LENGTH} is {header_length}, but the body has {len(body)} bytes")
    # the JSON part
    view = memoryview(body)
    part = body if header_length is None else bytes(view[:header_length])
    if part.count(b"{") > MAX_OBJECTS or part.count(b":") > MAX_KEYS:
        raise ProtocolError("the JSON part has more objects or fields than a request can have")
    try:
        header = _decode_header(part)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"the JSON part is not a valid request: {error} (to send a photograph as it is: POST /classify)"
        ) from error
    except RecursionError as error:
        raise ProtocolError("the JSON part is nested too deeply") from error
    return checked(header, view[header_length:] if header_length is not None else None, signature)


def checked(header: Header, raw: memoryview | None, signature: Signature) -> InferRequest:
    """-> the request, over HTTP or gRPC. raw: the tensors behind its description. Raises ProtocolError."""
    note("id", header.id)  # first: what is refused is logged
    # the one input
    if len(header.inputs) != 1:
        raise ProtocolError(
            f"give exactly one input, {IMAGES!r} or {ENCODED!r}; this request has {len(header.inputs)}"
        )
    tensor = header.inputs[0]
    _refuse_shared_memory(tensor)
    images, encoded = None, []
    if tensor.name == IMAGES:
        _check(tensor, "UINT8", [signature.height, signature.width, 3], signature)
        images = _uint8_tensor(tensor, _raw_data(tensor, raw))
    elif tensor.name == ENCODED:
        _check(tensor, "BYTES", [], signature)
        encoded = _bytes_tensor(tensor, _raw_data(tensor, raw))
    else:
        raise ProtocolError(f"unknown input; {signature.name} takes {IMAGES!r} or {ENCODED!r}")

    # the outputs asked for
    outputs = header.outputs or [RequestedOutput(name) for name in signature.outputs]
    for output in outputs:
        _refuse_shared_memory(output)
        if output.name not in signature.outputs:
            raise ProtocolError(f"unknown output; {signature.name} gives {', '.join(signature.outputs)}")
    if len({output.name for output in outputs}) != len(outputs):
        raise ProtocolError("an output is requested twice")
    return InferRequest(
        header.id, images, encoded, outputs, bool(header.parameters.get("binary_data_output", False))
    )


def write_response(
    signature: Signature, request: InferRequest, results: Mapping[str, np.ndarray]
) -> tuple[list[bytes | memoryview], int | None]:
    """-> (the body as buffers, header_length as in `read_request`). results:
    output name -> float32 [n, ...], but for DATATYPES."""
    described: list[dict[str, Any]] = []
    raw: list[bytes | memoryview] = []
    for output in request.outputs:
        values, labels, datatype = answered(output, results[output.name], signature)
        entry: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": list(values.shape)}
        if output.parameters.get("binary_data", request.binary_by_default):
            buffer = raw_bytes(values, labels)
            entry["parameters"] = {"binary_data_size": len(buffer)}
            raw.append(buffer)
        else:
            entry["data"] = values.ravel().tolist() if labels is None else labels
        described.append(entry)
    answer: dict[str, Any] = {"model_name": signature.name, "model_version": VERSION, "outputs": described}
    if request.id:
        answer["id"] = request.id
    header = _encode_header(answer)
    return [header, *raw], (len(header) if raw else None)


def answered(
    output: RequestedOutput, values: np.ndarray, signature: Signature
) -> tuple[np.ndarray, list[str] | None, str]:
    """-> (values, labels in their place if those were asked for, datatype) of one output."""
    if count := _class_count(output):
        labels, order, datatype = _classification(values, count, signature.classes)
        return order, labels, datatype
    return values, None, datatype_of(output.name)


def _refuse_shared_memory(tensor: Tensor | RequestedOutput) -> None:
    """A client would read a region that nobody has written."""
    if "shared_memory_region" in tensor.parameters:
        raise ProtocolError("shared memory is not supported; send and take tensors in the body")


def _check(tensor: Tensor, datatype: str, image_shape: list[int], signature: Signature) -> None:
    if tensor.datatype != datatype:
        raise ProtocolError(f"input {tensor.name!r} has to be {datatype}")
    shape = tensor.shape
    count = shape[0] if shape else 0
    if shape[1:] != image_shape or count < 1:
        wanted = ", ".join(["n", *map(str, image_shape)])
        raise ProtocolError(f"input {tensor.name!r} has to have the shape [{wanted}], n >= 1")
    if count > signature.max_images:
        raise ProtocolError(
            f"{signature.name} takes at most {signature.max_images} images a request; send several requests"
        )


def _raw_data(tensor: Tensor, raw: memoryview | None) -> memoryview | None:
    """-> the tensor's bytes behind the header, or None when its data is in the JSON."""
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        if raw:
            raise ProtocolError("bytes follow the JSON part, but no input has the parameter binary_data_size")
        if not bytes(tensor.data):
            raise ProtocolError(f"input {tensor.name!r} has neither data nor the parameter binary_data_size")
        return None
    if bytes(tensor.data):
        raise ProtocolError(f"input {tensor.name!r} has both data and the parameter binary_data_size")
    if raw is None:
        raise ProtocolError(f"binary_data_size needs the HTTP header {HEADER_LENGTH}")
    if size != len(raw) or isinstance(size, bool):
        raise ProtocolError(f"binary_data_size has to equal the {len(raw)} bytes behind the JSON part")
    return raw


def _uint8_tensor(tensor: Tensor, raw: memoryview | None) -> np.ndarray:
    shape = tensor.shape
    count = math.prod(shape)
    if raw is None:
        data = bytes(tensor.data)
        _check_numbers(tensor, data, count)
        try:
            values = np.asarray(msgspec.json.decode(data))
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise ProtocolError(f"the data of input {tensor.name!r} is not an array of numbers") from error
        # numpy would silently cut 1.5 to 1, which is no pixel
        if values.dtype.kind != "i" or (values.size and (values.min() < 0 or values.max() > 255)):
            raise ProtocolError(f"the data of input {tensor.name!r} has to be whole numbers from 0 to 255")
        if values.size != count or (values.ndim != 1 and list(values.shape) != shape):
            raise _wrong_count(tensor, count)
        return values.astype(np.uint8).reshape(shape)
    if len(raw) != count:
        raise ProtocolError(f"input {tensor.name!r} has {len(raw)} bytes, its shape needs {count}")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def _check_numbers(tensor: Tensor, data: bytes, count: int) -> None:
    """Raises ProtocolError for what cannot be `count` numbers, in lists of the tensor's shape or flat.

    By counting characters: to parse what is no tensor, such as a million empty lists, stops every other
    answer for seconds.
    """
    # true and false would be 1 and 0
    if any(character in data for character in (b"t", b"f", b"n", b"{", b'"')):
        raise ProtocolError(
            f"the data of input {tensor.name!r} is not an array of numbers; it has to be whole numbers "
            "from 0 to 255"
        )
    shape = tensor.shape
    lists = 1 + sum(math.prod(shape[:depth]) for depth in range(1, len(shape)))
    if data.count(b"[") > lists or data.count(b",") != count - 1:
        raise _wrong_count(tensor, count)


def _wrong_count(tensor: Tensor, count: int) -> ProtocolError:
    return ProtocolError(f"the data of input {tensor.name!r} does not have the {count} values of its shape")


def _bytes_tensor(tensor: Tensor, raw: memoryview | None) -> list[bytes]:
    """BYTES elements: in raw form each has a little-endian uint32 length before it."""
    if raw is None:
        if bytes(tensor.data).count(b",") > tensor.shape[0]:
            raise ProtocolError(
                f"input {tensor.name!r} has more elements than the {tensor.shape[0]} of its shape"
            )
        try:
            texts = msgspec.json.decode(tensor.data, type=list[str])
            elements = [base64.b64decode(text, validate=True) for text in texts]
        except (msgspec.DecodeError, binascii.Error, ValueError) as error:
            raise ProtocolError(f"the data of input {tensor.name!r} has to be base64 strings") from error
    else:
        elements, position = [], 0
        while position < len(raw) and len(elements) <= tensor.shape[0]:
            end = position + 4
            if end <= len(raw):
                end += struct.unpack_from("<I", raw, position)[0]
            if end > len(raw):
                raise ProtocolError(f"input {tensor.name!r} ends in the middle of an element")
            elements.append(bytes(raw[position + 4 : end]))
            position = end
    if len(elements) != tensor.shape[0]:
        raise ProtocolError(
            f"input {tensor.name!r} has {len(elements)} elements, its shape says {tensor.shape[0]}"
        )
    return elements


def _class_count(output: RequestedOutput) -> int:
    count = output.parameters.get("classification", 0)
    if count and output.name not in ("logits", "probabilities"):
        raise ProtocolError("classification is defined for logits and probabilities")
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ProtocolError("the parameter classification has to be a whole number")
    return count


def _classification(
    values: np.ndarray, count: int, classes: Sequence[str]
) -> tuple[list[str], np.ndarray, str]:
    """Triton's classification extension: float32 [n, classes] -> "value:index:label" of the `count` largest,
    row by row."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    labels = [f"{values[row, i]:f}:{i}:{classes[i]}" for row in range(len(values)) for i in order[row]]
    return labels, order, "BYTES"


def raw_bytes(values: np.ndarray, labels: list[str] | None) -> bytes | memoryview:
    if labels is None and values.dtype.kind in "bi":
        return values.astype(values.dtype.newbyteorder("<")).tobytes()
    if labels is None:
        return np.ascontiguousarray(values, "<f4").data.cast("B")
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in labels)
