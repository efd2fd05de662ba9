"""A TensorRT engine on an NVIDIA GPU, in either flavour: `tensorrt` (data centre and all GPUs)
or `tensorrt_rtx`.

Loading an engine runs native code, so it happens only for one whose hash was checked (a bundle's) or that
this user's own cache holds (tensorrt_cache.py), and only for one that was built by this version for this GPU.
Buffers come from cuda-bindings; torch is not needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from ffl_deploy.errors import CheckError, OtherMachine
from ffl_deploy.manifest import EngineRecord, Variant
from ffl_deploy.runtime.gpu import Gpu, checked, import_cuda, pinned_bytes, this_gpu
from ffl_deploy.runtime.session import Outputs, Session, outputs_from
from ffl_deploy.runtime.tensorrt_cache import Engine, keep_kernels, read_kernels
from ffl_deploy.runtime.tensorrt_modules import import_tensorrt, message_collector, one_line

LANES = 2
"""Calls that are worked on at a time: while the GPU computes for one, the other's images are on their way. A
lane is opened when it is first needed."""


class TensorRtSession(Session):
    """An engine and what runs it. Calls from several threads run on LANES streams, and wait where those are
    taken.

    Buffers and streams go back to the GPU with `close`, or with the session itself where nobody closes it.
    Raises UsageError where TensorRT or a GPU is missing, OtherMachine where the engine was built for
    something else, CheckError where TensorRT refuses it or the GPU has no room for it.
    """

    runtime = "tensorrt"

    def __init__(self, engine: Engine, variant: Variant) -> None:
        record, self.variant = engine.record, variant.name
        self.computed = variant.precision.stored  # strongly typed
        trt = import_tensorrt(record.flavour)
        self._cuda, gpu = import_cuda(), this_gpu()
        check_machine(engine, str(trt.__version__), gpu)
        self.device = self.gpu = f"{gpu.name} ({gpu.compute_capability})"
        digest = hashlib.sha256(engine.content).hexdigest()
        self.version = f"{trt.__version__} {record.flavour}, engine {digest[:16]}"
        self._logger = message_collector(trt)
        runtime = trt.Runtime(self._logger)
        self._engine = runtime.deserialize_cuda_engine(engine.content)
        if self._engine is None:
            raise CheckError(
                f"TensorRT cannot load {engine.name}: {one_line(self._logger.errors)}; {engine.rebuild}."
            )
        self._profiles = [tuple(sizes) for sizes in record.profiles] or [
            (record.profile["min"], record.profile["opt"], record.profile["max"])
        ]
        self._max_batch = self._profiles[-1][-1]
        self._tensors = [
            _Tensor.of(trt, self._engine, name)
            for name in map(self._engine.get_tensor_name, range(self._engine.num_io_tensors))
        ]
        self._lanes: list[_Lane] = []
        self._idle: SimpleQueue[_Lane] = SimpleQueue()
        self._lock = Lock()
        # Nothing that is held may know the session, or it would never go.
        self._held = ExitStack()
        self._finalizer = weakref.finalize(self, self._held.close)
        self._context_config = self._runtime_cache(trt, engine)
        try:
            self._idle.put(self._new_lane(engine.name))
        except BaseException:
            self.close()
            raise

    def _runtime_cache(self, trt: Any, engine: Engine) -> Any:
        """-> how TensorRT-RTX is to compile the engine for this GPU: with what it kept of the last time; None
        for TensorRT, whose engines are compiled already."""
        if engine.record.flavour != "tensorrt_rtx" or not hasattr(self._engine, "create_runtime_config"):
            return None
        checked(self._cuda, self._cuda.cudaFree(0))  # a context, which the cache is compared with
        config = self._engine.create_runtime_config()
        compiled, before = config.create_runtime_cache(), read_kernels(engine.kernels)
        if before is not None:
            compiled.deserialize(before)  # what does not fit is left out
        config.set_runtime_cache(compiled)

        def keep(name: str = engine.kernels) -> None:
            now = bytes(compiled.serialize())
            if now != before:
                keep_kernels(name, now)

        self._held.callback(keep)
        return config

    def _new_lane(self, name: str = "the engine") -> _Lane:
        """Open a further execution context with its stream and buffers."""
        context = (
            self._engine.create_execution_context()
            if self._context_config is None
            else self._engine.create_execution_context(self._context_config)
        )
        if context is None:
            raise CheckError(
                f"TensorRT cannot prepare {name}: {one_line(self._logger.errors)}; free some GPU memory."
            )
        lane = _Lane(self._cuda, context, self._held, self._tensors, self._max_batch)
        self._lanes.append(lane)
        return lane

    def run(self, images: np.ndarray) -> Outputs:
        return outputs_from(self.compute({"images": images}))

    def compute(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """-> the engine's outputs by name, for inputs by name, [n, ...] each. Raises CheckError."""
        count = len(next(iter(inputs.values())))
        with self._lane() as lane:
            chunks = [slice(start, start + self._max_batch) for start in range(0, count, self._max_batch)]
            parts = [self._run(lane, {name: rows[part] for name, rows in inputs.items()}) for part in chunks]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @contextlib.contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """Hold a lane: one that is idle, a new one, or the next that becomes idle."""
        try:
            lane = self._idle.get_nowait()
        except Empty:
            with self._lock:
                if len(self._lanes) < LANES:
                    with contextlib.suppress(CheckError):  # no room for a second one
                        self._idle.put(self._new_lane())
            lane = self._idle.get()
        try:
            yield lane
        finally:
            self._idle.put(lane)

    def _run(self, lane: _Lane, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        shape = next(iter(inputs.values())).shape
        profile = next(
            (index for index, (least, _, most) in enumerate(self._profiles) if least <= shape[0] <= most),
            None,
        )
        self._logger.errors.clear()
        if profile is None or not lane.take(profile, inputs):
            reason = (
                one_line(self._logger.errors) if profile is not None else "no profile of it has this size"
            )
            raise CheckError(f"the engine takes no batch of shape {shape}: {reason}.")
        if not lane.compute():
            # the reason may lie in the GPU itself
            checked(self._cuda, self._cuda.cudaGetLastError())
            raise CheckError(f"TensorRT cannot run a batch of {shape[0]}: {one_line(self._logger.errors)}.")
        return lane.results()

    def warm_up_sizes(self, largest: int) -> list[int]:
        return sorted({min(most, largest) for least, _, most in self._profiles if least <= largest})

    def close(self) -> None:
        """Give the device memory back; the session cannot be used afterwards."""
        self._finalizer()


class _Tensor(NamedTuple):
    """An input or output of an engine; `row`: its shape without the batch."""

    name: str
    dtype: np.dtype[Any]
    row: tuple[int, ...]
    is_input: bool

    @classmethod
    def of(cls, trt: Any, engine: Any, name: str) -> _Tensor:
        dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        row = tuple(int(size) for size in tuple(engine.get_tensor_shape(name))[1:])
        return cls(name, dtype, row, engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row) * self.dtype.itemsize


class _Lane:
    """An execution context, its stream, and for each tensor a buffer on the GPU and a pinned one beside it,
    for the largest batch: a copy between pinned memory and the GPU needs no detour, and the host goes on
    meanwhile.

    What is allocated is freed by `held`, also where a later allocation fails. One call at a time.
    """

    def __init__(
        self, cuda: Any, context: Any, held: ExitStack, tensors: Sequence[_Tensor], max_batch: int
    ) -> None:
        self._cuda, self._context, self._tensors = cuda, context, tensors
        self._profile: int | None = None  # a second context need not have the first profile by itself
        self._rows = 0
        self._device: dict[str, int] = {}
        self._host: dict[str, np.ndarray] = {}
        self._stream = checked(cuda, cuda.cudaStreamCreate())
        held.callback(cuda.cudaStreamDestroy, self._stream)
        for tensor in tensors:
            size = max_batch * tensor.row_bytes
            self._device[tensor.name] = pointer = checked(cuda, cuda.cudaMalloc(size))
            held.callback(cuda.cudaFree, pointer)
            pinned = pinned_bytes(cuda, size, held).view(tensor.dtype)
            self._host[tensor.name] = pinned.reshape(max_batch, *tensor.row)
        held.callback(cuda.cudaStreamSynchronize, self._stream)  # first of all, when they go

    def take(self, profile: int, inputs: Mapping[str, np.ndarray]) -> bool:
        """Choose the engine's kernels for so many rows, and send those; -> whether the engine takes them."""
        self._rows = len(next(iter(inputs.values())))
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, int(self._stream)):
                return False
            self._profile = profile
        for tensor in self._tensors:
            if not self._context.set_tensor_address(tensor.name, int(self._device[tensor.name])):
                return False
            if not tensor.is_input:
                continue
            rows = inputs.get(tensor.name)
            if rows is None or rows.shape[1:] != tensor.row:
                return False
            if not self._context.set_input_shape(tensor.name, rows.shape):
                return False
            self._host[tensor.name][: self._rows] = rows
            self._copy(tensor, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
        return True

    def compute(self) -> bool:
        """-> whether TensorRT has begun to run the engine."""
        return bool(self._context.execute_async_v3(int(self._stream)))

    def results(self) -> dict[str, np.ndarray]:
        """-> the outputs, once they are there."""
        outputs = [tensor for tensor in self._tensors if not tensor.is_input]
        for tensor in outputs:
            self._copy(tensor, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        checked(self._cuda, self._cuda.cudaStreamSynchronize(self._stream))
        # copies: the next call writes over the buffer
        return {tensor.name: self._host[tensor.name][: self._rows].copy() for tensor in outputs}

    def _copy(self, tensor: _Tensor, kind: Any) -> None:
        device, host = self._device[tensor.name], self._host[tensor.name].ctypes.data
        to_device = kind == self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        target, source = (device, host) if to_device else (host, device)
        size = self._rows * tensor.row_bytes
        checked(self._cuda, self._cuda.cudaMemcpyAsync(target, source, size, kind, self._stream))


def check_machine(engine: Engine, version: str, gpu: Gpu) -> None:
    """Raise OtherMachine where the engine was built by another version or for another GPU."""
    record: EngineRecord = engine.record
    if record.version != version:
        raise OtherMachine(
            f"{engine.name} was built by {record.flavour} {record.version}, this machine has {version}, and "
            f"engines do not carry over; {engine.rebuild}."
        )
    if record.compute_capabilities and gpu.compute_capability not in record.compute_capabilities:
        raise OtherMachine(
            f"{engine.name} was built for compute capability {', '.join(record.compute_capabilities)}, this "
            f"GPU has {gpu.compute_capability}; {engine.rebuild}."
        )
