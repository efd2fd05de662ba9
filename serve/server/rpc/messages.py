"""The messages of both services, and how much a message may hold before anybody parses it.

They live in a pool of their own: Triton's client has messages of the same names, and both may be imported.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from serve.server.protocol import ProtocolError

INFERENCE, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"
DESCRIPTORS = "protocols.binpb"  # of the .proto files here, by protoc
MOST_FIELDS = 4000
"""Of a message with what is inside it: an empty one takes two bytes on the wire, a hundred in memory."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
LONGEST_VARINT = 10


@cache
def pool() -> descriptor_pool.DescriptorPool:
    """-> what the .proto files say."""
    found = descriptor_pool.DescriptorPool()
    content = files("serve.server.rpc").joinpath(DESCRIPTORS).read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(content).file:
        found.Add(file)
    return found


@cache
def message(name: str) -> Any:
    """-> the class of a message; the name is without its package for those of the inference protocol."""
    full = name if "." in name else f"inference.{name}"
    return message_factory.GetMessageClass(pool().FindMessageTypeByName(full))


def parsed(kind: Any, data: bytes) -> Any:
    """-> a message of this class. Raises ProtocolError for what is none, or far more than one can have."""
    try:
        _count_fields(memoryview(data), kind.DESCRIPTOR, [MOST_FIELDS])
        return kind.FromString(data)
    except (DecodeError, IndexError) as error:
        raise ProtocolError("the message cannot be read") from error


def _count_fields(data: memoryview, descriptor: Descriptor, left: list[int]) -> None:
    """Walk through a message on the wire, and the messages inside it.

    Source: https://protobuf.dev/programming-guides/encoding/
    """
    position, end = 0, len(data)
    while position < end:
        left[0] -= 1
        if left[0] < 0:
            raise ProtocolError("the message has more fields than a request can have; use raw contents")
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == BYTES:
            length, position = _varint(data, position)
            if position + length > end:
                raise DecodeError("a field ends behind its message")
            field = descriptor.fields_by_number.get(number)
            if field is not None and field.type == FieldDescriptor.TYPE_MESSAGE:
                _count_fields(data[position : position + length], field.message_type, left)
            position += length
        elif wire == VARINT:
            _, position = _varint(data, position)
        elif wire in (FIXED64, FIXED32):
            position += 8 if wire == FIXED64 else 4
        else:  # groups, which proto3 does not have
            raise DecodeError("an unknown wire type")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """-> (the number, the position behind it)."""
    value = 0
    for index in range(LONGEST_VARINT):
        byte = data[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise DecodeError("a number without an end")
