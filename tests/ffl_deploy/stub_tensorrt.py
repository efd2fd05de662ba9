"""TensorRT and CUDA without a GPU: stand-ins that keep account of what is built, allocated, run and freed."""

from __future__ import annotations

import ctypes
from collections import Counter
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

CLASSES = 10
SHAPES: dict[str, tuple[tuple[int, ...], type, int]] = {
    "images": ((-1, 32, 32, 3), np.uint8, 0),
    "logits": ((-1, CLASSES), np.float32, 1),
    "probabilities": ((-1, CLASSES), np.float32, 1),
}


class Status(int):
    """cuda-bindings' error code."""

    name = "cudaSuccess"


class Failure(Status):
    name = "cudaErrorMemoryAllocation"


class Cuda:
    """cuda.bindings.runtime. live: pointer -> bytes that were allocated and not freed; fail_after:
    so many allocations work."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self, capability: tuple[int, int] = (9, 0), fail_after: int = 1000) -> None:
        self.capability, self.fail_after = capability, fail_after
        self.live: dict[int, int] = {}
        self.streams = 0
        self.calls: Counter[str] = Counter()

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        self.streams += 1
        return Status(0), 7

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.streams -= 1
        return (Status(0),)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        return (Status(0),)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        self.calls["malloc"] += 1
        if self.calls["malloc"] > self.fail_after:
            return Failure(2), None
        pointer = 1000 + self.calls["malloc"]
        self.live[pointer] = size
        return Status(0), pointer

    def cudaFree(self, pointer: int) -> tuple[Any, ...]:
        del self.live[pointer]  # a second time is a KeyError
        return (Status(0),)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Any, ...]:
        if kind == self.cudaMemcpyKind.cudaMemcpyDeviceToHost:
            ctypes.memset(target, 0, size)
        return (Status(0),)

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return Status(0), 1

    def cudaGetDeviceProperties(self, index: int) -> tuple[Any, ...]:
        return Status(0), SimpleNamespace(
            major=self.capability[0], minor=self.capability[1], name=b"NVIDIA Stub"
        )

    def cudaGetErrorString(self, status: int) -> tuple[Any, ...]:
        return Status(0), b"out of memory"


def tensorrt(version: str = "10.13.3.9", complaint: str = "", builds: bool = True) -> ModuleType:
    """-> a module `tensorrt`. complaint: what the builder logs as an error; builds:
    whether it returns an engine all the same."""
    module: Any = ModuleType("tensorrt")
    module.__version__ = version

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

        def log(self, severity: int, message: str) -> None: ...

    class Context:
        def set_tensor_address(self, name: str, pointer: int) -> bool:
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.rows = shape[0]
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (self.rows, *SHAPES[name][0][1:])

        def execute_async_v3(self, stream: int) -> bool:
            return True

    class Engine:
        num_io_tensors = len(SHAPES)
        get_tensor_name = staticmethod(lambda index: list(SHAPES)[index])
        get_tensor_dtype = staticmethod(lambda name: SHAPES[name][1])
        get_tensor_shape = staticmethod(lambda name: SHAPES[name][0])
        get_tensor_mode = staticmethod(lambda name: SHAPES[name][2])
        create_execution_context = Context

    class Anything:
        """A network, configuration or profile: takes every call."""

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments, **named: 0

    class Builder:
        def __init__(self, log: ILogger) -> None:
            self.log = log

        create_network = create_builder_config = create_optimization_profile = lambda self, *flags: Anything()

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            if complaint:
                self.log.log(ILogger.ERROR, complaint)
            return b"an engine" if builds else None

    module.ILogger, module.Builder = ILogger, Builder
    module.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=lambda content: Engine())
    module.OnnxParser = lambda network, log: SimpleNamespace(parse_from_file=lambda path: True, num_errors=0)
    module.nptype = lambda kind: kind
    module.TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)
    module.BuilderFlag = SimpleNamespace(TF32=7)
    module.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    return module
