"""TensorRT and CUDA without a GPU: stand-ins that keep account of what is built, allocated, copied, run and
freed.

The GPU's memory is memory of this process, copies are copies, and an engine is the ONNX file that it was
built from, computed by ONNX Runtime on what lies at the addresses that it was given: a wrong address, size or
shape gives wrong logits, or an error.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

VERSION = "10.13.3.9"
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2


class Status(int):
    """cuda-bindings' error code."""

    name = "cudaSuccess"


OK = Status(0)


def failed(name: str, code: int) -> Status:
    status = Status(code)
    status.name = name
    return status


class Cuda:
    """cuda.bindings.runtime.

    live: address -> bytes of what was allocated and not freed, on the GPU and pinned; fail_after: so many
    allocations work; broken: the error that every further call gives, as CUDA does after one that it does not
    come back from.
    """

    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=HOST_TO_DEVICE, cudaMemcpyDeviceToHost=DEVICE_TO_HOST
    )

    def __init__(self, capability: tuple[int, int] = (9, 0), count: int = 1, driver: int = 13000) -> None:
        self.capability, self.count, self.driver = capability, count, driver
        self.fail_after = 1000
        self.broken: Status | None = None
        self.live: dict[int, Any] = {}
        self.pinned: set[int] = set()
        self.streams: set[int] = set()
        self.calls: Counter[str] = Counter()

    @property
    def held(self) -> tuple[int, int, int]:
        """(allocations on the GPU, pinned ones, streams) that were not given back."""
        return len(self.live) - len(self.pinned), len(self.pinned), len(self.streams)

    def _answer(self, call: str, *values: Any) -> tuple[Any, ...]:
        self.calls[call] += 1
        return (self.broken, *(None for _ in values)) if self.broken else (OK, *values)

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        answer = self._answer("stream", 7 + self.calls["stream"])
        if answer[0] == 0:
            self.streams.add(answer[1])
        return answer

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.streams.remove(stream)
        return self._answer("destroy")

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        assert stream in self.streams
        return self._answer("synchronize")

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._allocate(size)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        answer = self._allocate(size)
        if answer[0] == 0:
            self.pinned.add(answer[1])
        return answer

    def _allocate(self, size: int) -> tuple[Any, ...]:
        if self.calls["malloc"] >= self.fail_after:
            return failed("cudaErrorMemoryAllocation", 2), None
        memory = ctypes.create_string_buffer(b"\xff" * size, size)  # what nobody wrote is no number
        answer = self._answer("malloc", ctypes.addressof(memory))
        if answer[0] == 0:
            self.live[answer[1]] = memory
        return answer

    def cudaFree(self, pointer: int) -> tuple[Any, ...]:
        if pointer:  # of 0 it does nothing but open a context
            assert pointer not in self.pinned
            del self.live[pointer]  # a second time is a KeyError
        return self._answer("free")

    def cudaFreeHost(self, pointer: int) -> tuple[Any, ...]:
        self.pinned.remove(pointer)
        del self.live[pointer]
        return self._answer("free")

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Any, ...]:
        answer = self._answer("copy")
        if answer[0] == 0:
            assert stream in self.streams
            for pointer, on_device in ((target, kind == HOST_TO_DEVICE), (source, kind == DEVICE_TO_HOST)):
                assert on_device != (pointer in self.pinned), "a copy between the GPU and pinned memory"
                assert size <= len(self.live[pointer]), "inside of what was allocated"
            ctypes.memmove(target, source, size)
        return answer

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        if self.driver == 0 or self.driver < 13000:
            return failed("cudaErrorInsufficientDriver", 35), None
        return (OK, self.count) if self.count else (failed("cudaErrorNoDevice", 100), None)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return OK, 13050

    def cudaGetDeviceProperties(self, index: int) -> tuple[Any, ...]:
        assert index == 0
        major, minor = self.capability
        return self._answer("properties", SimpleNamespace(major=major, minor=minor, name=b"NVIDIA Stub"))

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        used = sum(map(len, self.live.values()))
        return self._answer("memory", (80 << 30) - used, 80 << 30)

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return self._answer("last error")

    def cudaGetErrorString(self, status: Status) -> tuple[Any, ...]:
        return OK, {2: b"out of memory", 700: b"an illegal memory access was encountered"}.get(status, b"?")


def tensorrt(cuda: Cuda, flavour: str = "tensorrt", complaint: str = "", builds: bool = True) -> ModuleType:
    """-> a module `tensorrt` or `tensorrt_rtx`. complaint: what the builder logs as an error; builds: whether
    it returns an engine all the same.

    Module attributes to look at and to set: `built`: what each build was asked for; `runs`: (profile, rows)
    of each run; `no_context`: creating a context fails; `compiled`: what TensorRT-RTX had of the last time.
    """
    import onnxruntime

    module: Any = ModuleType(flavour)
    module.__version__ = VERSION
    module.built, module.runs, module.compiled, module.no_context = [], [], [], False

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

        def log(self, severity: int, message: str) -> None: ...

    class Profile:
        def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
            self.batches = [shape[0] for shape in (least, best, most)]

    class Config:
        def __init__(self) -> None:
            self.profiles: list[list[int]] = []
            self.cleared: list[int] = []
            self.timings = b""

        def clear_flag(self, flag: int) -> None:
            self.cleared.append(flag)

        def add_optimization_profile(self, profile: Profile) -> int:
            self.profiles.append(profile.batches)
            return len(self.profiles) - 1

        def set_compute_capability(self, member: str, index: int) -> bool:
            return True

        def create_timing_cache(self, content: bytes) -> bytes:
            return content

        def set_timing_cache(self, content: bytes, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            self.timings = content
            return True

        def get_timing_cache(self) -> Any:
            return SimpleNamespace(serialize=lambda: self.timings + b"timed")

    class Parser:
        def __init__(self, network: Any, log: ILogger) -> None:
            self.network, self.num_errors = network, 0

        def parse_from_file(self, path: str) -> bool:
            try:
                session = onnxruntime.InferenceSession(path)
            except Exception as error:
                self.num_errors, self._error = 1, str(error)
                return False
            self.network.content = Path(path).read_bytes()
            inputs = [
                SimpleNamespace(
                    name=one.name, shape=tuple(size if isinstance(size, int) else -1 for size in one.shape)
                )
                for one in session.get_inputs()
            ]
            self.network.num_inputs, self.network.get_input = len(inputs), inputs.__getitem__
            return True

        def get_error(self, index: int) -> Any:
            return SimpleNamespace(desc=lambda: self._error)

    class Builder:
        def __init__(self, log: ILogger) -> None:
            self.log = log

        def create_network(self, flags: int) -> Any:
            return SimpleNamespace()

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
            module.built.append(config)
            if complaint:
                self.log.log(ILogger.ERROR, complaint)
            header = json.dumps({"profiles": config.profiles}).encode()
            return header + b"\n" + network.content if builds else None

    class Context:
        def __init__(self, engine: Engine) -> None:
            self.engine, self.addresses, self.rows = engine, {}, 0
            # the first context of an engine has its first profile; another one has none until it is told
            self.profile = 0 if engine.contexts == 0 else None
            engine.contexts += 1

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            self.profile, self.rows = index, 0
            return index < len(self.engine.profiles)

        def set_tensor_address(self, name: str, pointer: int) -> bool:
            assert pointer in cuda.live
            assert pointer not in cuda.pinned
            self.addresses[name] = pointer
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            least, _, most = self.engine.profiles[self.profile]
            self.rows = shape[0]
            return least <= shape[0] <= most

        def execute_async_v3(self, stream: int) -> bool:
            assert stream in cuda.streams
            if cuda.broken:
                return False
            module.runs.append((self.profile, self.rows))
            feeds = {
                name: self._array(name, self.engine.get_tensor_dtype(name)) for name in self.engine.inputs
            }
            values = self.engine.session.run(None, feeds)
            for output, value in zip(self.engine.session.get_outputs(), values, strict=True):
                self._array(output.name, np.float32)[:] = value
            return True

        def _array(self, name: str, dtype: type) -> np.ndarray:
            shape = (self.rows, *self.engine.shapes[name][1:])
            count = int(np.prod(shape))
            return np.frombuffer(cuda.live[self.addresses[name]], dtype, count).reshape(shape)

    class Engine:
        def __init__(self, content: bytes) -> None:
            header, _, model = content.partition(b"\n")
            self.profiles = json.loads(header)["profiles"]
            self.session = onnxruntime.InferenceSession(model)
            tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
            self.inputs = [tensor.name for tensor in self.session.get_inputs()]
            self.shapes = {tensor.name: (-1, *tensor.shape[1:]) for tensor in tensors}
            self.num_io_tensors, self.contexts = len(self.shapes), 0

        def get_tensor_name(self, index: int) -> str:
            return list(self.shapes)[index]

        def get_tensor_dtype(self, name: str) -> type:
            return np.uint8 if name == "images" else np.float32

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self.shapes[name]

        def get_tensor_mode(self, name: str) -> int:
            return int(name not in self.inputs)

        def create_execution_context(self, config: Any = None) -> Context | None:
            return None if module.no_context else Context(self)

        if flavour == "tensorrt_rtx":

            def create_runtime_config(self) -> Any:
                return SimpleNamespace(
                    create_runtime_cache=RuntimeCache, set_runtime_cache=lambda cache: True
                )

    class RuntimeCache:
        def __init__(self) -> None:
            self.content = b""

        def deserialize(self, content: bytes) -> bool:
            module.compiled.append(content)
            self.content = content
            return True

        def serialize(self) -> bytes:
            return self.content or b"compiled for this GPU"

    def deserialize(content: bytes) -> Engine | None:
        return Engine(content) if content.startswith(b"{") else None

    module.ILogger, module.Builder, module.OnnxParser = ILogger, Builder, Parser
    module.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=deserialize)
    module.nptype = lambda kind: kind
    module.TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)
    module.BuilderFlag = SimpleNamespace(TF32=7)
    module.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    if flavour == "tensorrt_rtx":
        module.ComputeCapability = SimpleNamespace(__members__={"SM89": 89, "SM90": 90, "SM120": 120})
    return module


def install(monkeypatch: pytest.MonkeyPatch, cuda: Cuda, flavour: str = "tensorrt", **how: Any) -> ModuleType:
    """Put the stand-ins in the place of TensorRT, and of cuda-bindings; -> the module of TensorRT."""
    module = tensorrt(cuda, flavour, **how)
    monkeypatch.setitem(sys.modules, flavour, module)
    for name in ("gpu", "tensorrt_runtime", "onnx_binding"):
        monkeypatch.setattr(f"ffl_deploy.runtime.{name}.import_cuda", lambda: cuda)
    for name in ("tensorrt_build", "tensorrt_cache"):
        monkeypatch.setattr(f"ffl_deploy.runtime.{name}.installed_flavour", lambda: flavour)
    monkeypatch.setattr("ffl_deploy.runtime.tensorrt_modules.installed_flavour", lambda: flavour)
    return module


def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let --gpu set its variables for this test alone, and find none set."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")  # remembers what was there
        monkeypatch.delenv(name)
