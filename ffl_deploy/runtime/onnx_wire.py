"""What deployment has to know of an ONNX file: which tensors lie outside it, and its graph. Reads the
protobuf wire format directly, since deployment installs no `onnx`.

A model from elsewhere must not name other files: external data has let models read any file of the machine
(three CVEs, closed in onnx 1.21).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ffl_deploy.errors import CheckError

# Message -> field number -> message of that field, from onnx.proto;
# only the fields through which a tensor can be reached.
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
    # the last: messages in messages, a thousand deep
    except (IndexError, ValueError, RecursionError) as error:
        raise CheckError(f"{path} is not a readable ONNX file ({error}); export the bundle again.") from error
    if names:
        raise CheckError(
            f"{path} keeps the tensor {names[0]!r} in another file; a bundle's models hold their own "
            "weights: do not use this bundle, or export it again."
        )


def read_metadata(path: Path) -> dict[str, str]:
    """-> the model's own metadata (metadata_props); nothing of its graph is read. Raises CheckError."""
    found: dict[str, str] = {}
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == 14 and isinstance(value, memoryview):
                entry = {key: bytes(text) for key, text in _fields(value) if isinstance(text, memoryview)}
                found[entry[1].decode()] = entry.get(2, b"").decode()
    except (IndexError, KeyError, ValueError) as error:
        raise CheckError(f"{path} is not a readable ONNX file ({error}); export the bundle again.") from error
    return found


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


TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16, 11: np.float64}
"""TensorProto.DataType -> NumPy's; tensors of other types are read as names alone."""


class Node(NamedTuple):
    """integers: attribute -> its value, where that is an integer; subgraphs:
    whether an attribute holds a graph."""

    operator: str
    domain: str
    name: str
    inputs: list[str]
    outputs: list[str]
    integers: dict[str, int]
    subgraphs: bool


class Graph(NamedTuple):
    """A model's main graph. tensors: initializer -> its values, None where they are of a type that TYPES does
    not know; functions: whether the model brings operators of its own."""

    nodes: list[Node]
    tensors: dict[str, np.ndarray | None]
    functions: bool


def read_graph(path: Path) -> Graph:
    """-> the graph of an ONNX file. Raises CheckError where it is not readable,
    or its tensors contradict their shapes."""
    nodes: list[Node] = []
    tensors: dict[str, np.ndarray | None] = {}
    functions = False
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == 25:
                functions = True
            if number != 7 or not isinstance(value, memoryview):
                continue
            for kind, part in _fields(value):
                if kind == 1 and isinstance(part, memoryview):
                    nodes.append(_node(part))
                elif kind == 5 and isinstance(part, memoryview):
                    name, array = _tensor(part)
                    if name in tensors:  # readers differ in which of the two they take
                        raise ValueError(f"two tensors are called {name!r}")
                    tensors[name] = array
    except (IndexError, ValueError, RecursionError) as error:
        raise CheckError(f"{path} is not a readable ONNX file ({error}); export the bundle again.") from error
    return Graph(nodes, tensors, functions)


def _node(message: memoryview) -> Node:
    text: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: [], 7: []}
    integers, subgraphs = {}, False
    for number, value in _fields(message):
        if not isinstance(value, memoryview):
            continue
        if number in text:
            text[number].append(bytes(value).decode())
        elif number == 5:
            # of a field that comes twice the last counts, as everywhere in protobuf
            attribute = dict(_fields(value))
            name, integer = attribute.get(1, memoryview(b"")), attribute.get(3)
            if isinstance(name, memoryview) and isinstance(integer, int):
                integers[bytes(name).decode()] = integer - (1 << 64 if integer >> 63 else 0)
            subgraphs = subgraphs or 6 in attribute or 11 in attribute
    last = {number: values[-1] if values else "" for number, values in text.items()}
    return Node(last[4], last[7], last[3], text[1], text[2], integers, subgraphs)


def _tensor(message: memoryview) -> tuple[str, np.ndarray | None]:
    """-> (name, values). Small integers may stand as packed numbers instead of bytes;
    floats are written as bytes alone."""
    shape: list[int] = []
    name, kind, raw, numbers = "", 0, None, list[int]()
    for number, value in _fields(message):
        if number in (1, 5):
            values = list(_packed(value)) if isinstance(value, memoryview) else [value]
            (shape if number == 1 else numbers).extend(values)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif number == 9 and isinstance(value, memoryview):
            raw = value
    if kind not in TYPES:
        return name, None
    dtype = np.dtype(TYPES[kind]).newbyteorder("<")
    if raw is not None:
        array = np.frombuffer(raw, dtype)
    elif dtype.kind in "iu" and dtype.itemsize < 8:
        array = (
            (np.array(numbers, np.uint64) & np.uint64(0xFFFFFFFF))
            .astype(np.uint32)
            .view(np.int32)
            .astype(dtype)
        )
    else:
        return name, None
    if array.size != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"the tensor {name!r} has {array.size} values for the shape {shape}")
    return name, array.reshape(shape)


def _packed(message: memoryview) -> Iterator[int]:
    position = 0
    while position < len(message):
        value, position = _varint(message, position)
        yield value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """-> (field number, value) of one message: an integer, or the bytes of a string,
    packed array or message."""
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
