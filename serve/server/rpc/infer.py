"""A ModelInferRequest -> an InferRequest, and the model's outputs -> a ModelInferResponse."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from serve.server.protocol import (
    VERSION,
    Header,
    InferRequest,
    Parameters,
    ProtocolError,
    RequestedOutput,
    Signature,
    Tensor,
    answered,
    checked,
    raw_bytes,
)
from serve.server.rpc.messages import message


def read_infer(asked: Any, signature: Signature) -> InferRequest:
    """-> the checked request of a ModelInferRequest. Raises ProtocolError."""
    inputs: list[tuple[Tensor, bytes]] = []
    raw = list(asked.raw_input_contents)
    for tensor in asked.inputs:
        if tensor.HasField("contents"):
            if raw:
                raise ProtocolError("a request has raw_input_contents or contents, not both")
            content = _contents(tensor)
        else:
            if len(raw) != len(asked.inputs):
                raise ProtocolError("raw_input_contents has to have an element for each input")
            content = raw[len(inputs)]
        parameters = {**_parameters(tensor.parameters), "binary_data_size": len(content)}
        shape = msgspec.Raw(msgspec.json.encode(list(tensor.shape)))
        inputs.append((Tensor(tensor.name, tensor.datatype, shape, parameters), content))
    outputs = [RequestedOutput(one.name, _parameters(one.parameters)) for one in asked.outputs]
    header = Header([one for one, _ in inputs], asked.id, _parameters(asked.parameters), outputs or None)
    return checked(header, memoryview(inputs[0][1]) if len(inputs) == 1 else None, signature)


def write_infer(signature: Signature, request: InferRequest, results: Mapping[str, np.ndarray]) -> Any:
    """-> the ModelInferResponse. results: output name -> float32 [n, ...]."""
    response = message("ModelInferResponse")(model_name=signature.name, model_version=VERSION, id=request.id)
    for output in request.outputs:
        values, labels, datatype = answered(output, results[output.name], signature)
        response.outputs.add(name=output.name, datatype=datatype, shape=values.shape)
        response.raw_output_contents.append(bytes(raw_bytes(values, labels)))
    return response


def _contents(tensor: Any) -> bytes:
    """-> typed contents as raw ones: of UINT8 the field of unsigned numbers, of BYTES that of bytes."""
    if tensor.datatype == "BYTES":
        found = tensor.contents.bytes_contents
        return b"".join(struct.pack("<I", len(one)) + one for one in found)
    values = np.asarray(tensor.contents.uint_contents, np.uint32)
    if len(values) and values.max() > 255:
        raise ProtocolError(f"the contents of input {tensor.name!r} have to be from 0 to 255")
    return values.astype(np.uint8).tobytes()


def _parameters(given: Mapping[str, Any]) -> Parameters:
    found: Parameters = {}
    for name, value in given.items():
        kind = value.WhichOneof("parameter_choice")
        if kind:
            found[name] = getattr(value, kind)
    return found
