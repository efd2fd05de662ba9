"""Which tensors of an ONNX file lie outside it. Reads the protobuf wire format directly, since deployment installs no `onnx`.

A model from elsewhere must not name other files: external data has let models read any file of the machine (three CVEs,
closed in onnx 1.21).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ffl_deploy.errors import CheckError

# Message -> field number -> message of that field, from onnx.proto; only the fields through which a tensor can be reached.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_TENSOR_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def refuse_external_data(path: Path) -> None:
    """Raises CheckError where the ONNX file keeps a tensor in another file, or is not an ONNX file."""
    try:
        names = list(_external_tensors(memoryview(path.read_bytes()), "model"))
    except (IndexError, ValueError, RecursionError) as error:  # the last: messages in messages, a thousand deep
        raise CheckError(f"{path} is not a readable ONNX file ({error}); export the bundle again.") from error
    if names:
        raise CheckError(
            f"{path} keeps the tensor {names[0]!r} in another file; a bundle's models hold their own weights: "
            "do not use this bundle, or export it again."
        )


def _external_tensors(message: memoryview, kind: str) -> Iterator[str]:
    name, external = "", False
    for number, value in _fields(message):
        if isinstance(value, memoryview):
            if number in _CHILDREN[kind]:
                yield from _external_tensors(value, _CHILDREN[kind][number])
            elif kind == "tensor" and number == _TENSOR_NAME:
                name = bytes(value).decode(errors="replace")
        if kind == "tensor" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0)):
            external = True
    if external:
        yield name


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """-> (field number, value) of one message: an integer, or the bytes of a string, packed array or message."""
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        if key > 0xFFFFFFFF:  # other readers of the format would take its lower bits for another field
            raise ValueError("a field's number is too large")
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            integer, position = _varint(message, position)
            yield number, integer
            continue
        if wire_type == _BYTES:
            length, position = _varint(message, position)
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type}")
        if position + length > end:
            raise ValueError("it is cut short")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
