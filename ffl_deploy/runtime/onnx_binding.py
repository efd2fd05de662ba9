"""ONNX Runtime on a GPU: runs on buffers that stay, of a few batch sizes.

A plain `session.run` allocates the input on the GPU anew and fills it from pageable memory, which CUDA copies
twice; and cuDNN searches its algorithms again for every batch size that it has not met. Here a batch is
padded to the next of a few sizes, and each size keeps its input on the GPU with pinned memory beside it.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from contextlib import ExitStack
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.runtime.gpu import import_cuda, pinned_bytes
from ffl_deploy.runtime.session import padded_sizes

LARGEST = 1024  # images in one run; more run in pieces


class BoundRuns:
    """Runs of an InferenceSession with its input bound to `device`: "cuda", or "cpu" to try this without a
    GPU.

    May be called from several threads at once; each holds buffers of its own for as long as its call takes.
    """

    def __init__(self, ort: Any, session: Any, outputs: list[str], device: str) -> None:
        self._ort, self._session, self._outputs, self._device = ort, session, outputs, device
        self._idle: SimpleQueue[dict[tuple[int, ...], _Buffers]] = SimpleQueue()
        fixed = session.get_inputs()[0].shape[0]
        self._fixed = fixed if isinstance(fixed, int) else None  # a graph with a static batch takes no other
        self._pinned = ExitStack()
        self._finalizer = weakref.finalize(self, self._pinned.close)

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 [n, height, width, 3] -> output -> values of n rows. Raises what ONNX Runtime raises."""
        try:
            buffers = self._idle.get_nowait()
        except Empty:
            buffers = {}
        try:
            parts = [
                self._run(buffers, images[start : start + LARGEST])
                for start in range(0, len(images), LARGEST)
            ]
        finally:
            self._idle.put(buffers)
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def _run(self, kept: dict[tuple[int, ...], _Buffers], images: np.ndarray) -> dict[str, np.ndarray]:
        rows = len(images)
        size = rows if self._fixed else next(size for size in padded_sizes(LARGEST) if size >= rows)
        shape = (size, *images.shape[1:])
        if shape not in kept:
            kept[shape] = _Buffers(self._ort, self._session, self._outputs, self._device, shape, self._pinned)
        return kept[shape].run(self._session, images)

    def close(self) -> None:
        """Give the pinned memory back; no run may follow."""
        self._finalizer()


class _Buffers:
    """One size's input on the device, the memory of the host that it is filled from, and the binding of
    both."""

    def __init__(
        self,
        ort: Any,
        session: Any,
        outputs: list[str],
        device: str,
        shape: tuple[int, ...],
        pinned: ExitStack,
    ) -> None:
        self._outputs = outputs
        self._host = pinned_array(shape, pinned) if device == "cuda" else np.zeros(shape, np.uint8)
        self._input = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.uint8, device, 0)
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("images", self._input)
        for name in outputs:
            self._binding.bind_output(name, device, 0)  # ONNX Runtime's arena keeps their memory

    def run(self, session: Any, images: np.ndarray) -> dict[str, np.ndarray]:
        rows = len(images)
        self._host[:rows] = images
        self._host[rows:] = 0
        self._input.update_inplace(self._host)
        session.run_with_iobinding(self._binding)
        values = self._binding.copy_outputs_to_cpu()
        return {name: np.array(value[:rows]) for name, value in zip(self._outputs, values, strict=True)}


def pinned_array(shape: tuple[int, ...], held: ExitStack) -> np.ndarray:
    """-> uint8 zeros in memory that the GPU copies from without a detour, freed by `held`; ordinary memory
    where there is no cuda-bindings, or no more of it."""
    with contextlib.suppress(UsageError, CheckError):
        array = pinned_bytes(import_cuda(), math.prod(shape), held).reshape(shape)
        array[:] = 0
        return array
    return np.zeros(shape, np.uint8)
