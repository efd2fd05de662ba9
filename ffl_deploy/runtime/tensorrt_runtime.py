"""A TensorRT engine on an NVIDIA GPU, in either flavour: `tensorrt` (data centre and all GPUs)
or `tensorrt_rtx`.

Loading an engine runs native code, so it happens only after the hash check (registry.open_session), and only
for an engine that was built by this version for this GPU. Buffers come from cuda-bindings; torch is not
needed.
"""

from __future__ import annotations

import importlib
import math
import weakref
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ffl_deploy.errors import CheckError, OtherMachine, UsageError
from ffl_deploy.installed import missing
from ffl_deploy.manifest import EngineRecord, Variant
from ffl_deploy.runtime.session import Outputs, Session, outputs_from

EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""Flavour, which is the Python module's name -> the extra of ffl-deploy that installs it."""


class TensorRtSession(Session):
    """An engine, its execution context and its device buffers. Calls from several threads take turns.

    Buffers and stream go back to the GPU with `close`, or with the session itself where nobody closes it.
    Raises UsageError where TensorRT or a GPU is missing, CheckError where the engine was built for something
    else.
    """

    runtime = "tensorrt"

    def __init__(self, model: Path, variant: Variant) -> None:
        self.variant = variant.name
        record = variant.engine
        trt = import_tensorrt(record.flavour)
        self.version = f"{record.flavour} {trt.__version__}"
        self._cuda = import_cuda()
        self.device = check_machine(record, str(trt.__version__), device_capability(self._cuda), model)
        self._logger = message_collector(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(model.read_bytes())
        if self._engine is None:
            raise CheckError(
                f"TensorRT cannot load {model}: {'; '.join(self._logger.errors) or 'no reason given'}; "
                f"{_rebuild(record)}"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise CheckError(
                f"TensorRT cannot prepare {model}: {'; '.join(self._logger.errors)}; free some GPU memory."
            )
        self._max_batch = record.profile["max"]
        self._lock = Lock()
        self._buffers: dict[str, tuple[int, np.dtype[Any], bool]] = {}
        self._stream = self._call(self._cuda.cudaStreamCreate())
        # From here on, so that what a failing allocation leaves goes back too.
        self._finalizer = weakref.finalize(self, _give_back, self._cuda, self._stream, self._buffers)
        self._allocate(trt)

    def _allocate(self, trt: Any) -> None:
        """Fill `_buffers`: tensor name -> (device pointer for the largest batch, dtype, is it an input)."""
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
            count = self._max_batch * math.prod(
                int(size) for size in tuple(self._engine.get_tensor_shape(name))[1:]
            )
            pointer = self._call(self._cuda.cudaMalloc(count * dtype.itemsize))
            self._buffers[name] = (
                pointer,
                dtype,
                self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            )
            self._context.set_tensor_address(name, pointer)

    def run(self, images: np.ndarray) -> Outputs:
        parts = [
            self._run(images[start : start + self._max_batch])
            for start in range(0, len(images), self._max_batch)
        ]
        return outputs_from({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        pixels = np.ascontiguousarray(images)
        kinds = self._cuda.cudaMemcpyKind
        results: dict[str, np.ndarray] = {}
        with self._lock:
            if not self._context.set_input_shape("images", pixels.shape):
                raise CheckError(
                    f"the engine takes no batch of shape {pixels.shape}: {'; '.join(self._logger.errors)}."
                )
            for name, (pointer, dtype, is_input) in self._buffers.items():
                if is_input:
                    copied = self._cuda.cudaMemcpyAsync(
                        pointer, pixels.ctypes.data, pixels.nbytes, kinds.cudaMemcpyHostToDevice, self._stream
                    )
                    self._call(copied)
                else:
                    results[name] = np.empty(tuple(self._context.get_tensor_shape(name)), dtype)
            if not self._context.execute_async_v3(int(self._stream)):
                raise CheckError(
                    f"TensorRT cannot run a batch of {len(images)}: {'; '.join(self._logger.errors)}."
                )
            for name, value in results.items():
                pointer = self._buffers[name][0]
                copied = self._cuda.cudaMemcpyAsync(
                    value.ctypes.data, pointer, value.nbytes, kinds.cudaMemcpyDeviceToHost, self._stream
                )
                self._call(copied)
            self._call(self._cuda.cudaStreamSynchronize(self._stream))
        return results

    def _call(self, answer: tuple[Any, ...]) -> Any:
        return checked(self._cuda, answer)

    def close(self) -> None:
        """Give the device memory back; the session cannot be used afterwards."""
        self._finalizer()


def _give_back(cuda: Any, stream: Any, buffers: dict[str, tuple[int, np.dtype[Any], bool]]) -> None:
    """Free what a session holds on the GPU, after what its stream still does."""
    cuda.cudaStreamSynchronize(stream)
    for pointer, _, _ in buffers.values():
        cuda.cudaFree(pointer)
    buffers.clear()
    cuda.cudaStreamDestroy(stream)


def check_machine(record: EngineRecord, version: str, capability: tuple[int, int], engine: Path) -> str:
    """-> what runs it, for people. Raises OtherMachine
    where the engine was built for another version or GPU."""
    if record.version != version:
        raise OtherMachine(
            f"{engine.name} was built by {record.flavour} {record.version}, this machine has {version}, and "
            f"engines do not carry over; {_rebuild(record)}"
        )
    own = f"{capability[0]}.{capability[1]}"
    if record.compute_capabilities and own not in record.compute_capabilities:
        raise OtherMachine(
            f"{engine.name} was built for compute capability {', '.join(record.compute_capabilities)}, this "
            f"GPU has {own}; {_rebuild(record)}"
        )
    return f"GPU {own}"


def _rebuild(record: EngineRecord) -> str:
    return (
        f"run ffl-export --tensorrt on this machine, or use {record.source} with --runtime "
        "onnxruntime-tensorrt."
    )


def import_tensorrt(flavour: str) -> Any:
    """-> the module `tensorrt` or `tensorrt_rtx`. Raises UsageError where it is not installed."""
    if flavour not in EXTRAS:
        raise UsageError(f"{flavour!r} is no flavour of TensorRT; known: {', '.join(EXTRAS)}.")
    try:
        return importlib.import_module(flavour)
    except ImportError as error:
        raise missing(flavour) from error


def import_cuda() -> Any:
    """-> the runtime API of cuda-bindings. Raises UsageError where it is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise missing("cuda") from error
    return runtime


ONNX_INSTEAD = "use the bundle's ONNX variants here: --variant fp32 --runtime onnxruntime"


def device_capability(cuda: Any, advice: str = ONNX_INSTEAD) -> tuple[int, int]:
    """-> compute capability of GPU 0. Raises UsageError, which ends with `advice`,
    where there is no usable GPU."""
    status, count = cuda.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        raise UsageError(f"TensorRT engines need an NVIDIA GPU and its driver ({status.name}); {advice}.")
    properties = checked(cuda, cuda.cudaGetDeviceProperties(0))
    return int(properties.major), int(properties.minor)


def checked(cuda: Any, answer: tuple[Any, ...]) -> Any:
    """cuda-bindings' (status, value...) -> value.
    Raises CheckError with CUDA's own name and text of the error."""
    status, *values = answer
    if int(status) != 0:
        _, text = cuda.cudaGetErrorString(status)
        raise CheckError(
            f"CUDA failed: {status.name} ({text.decode() if isinstance(text, bytes) else text})."
        )
    return values[0] if values else None


def message_collector(trt: Any) -> Any:
    """-> a TensorRT logger that keeps messages instead of printing them: `errors` and `warnings`,
    lists of text.

    Builder and parser return None on failure; what went wrong is only in these messages.
    """

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)

    return Collector()
