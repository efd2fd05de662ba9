"""This machine's GPU: which one it is, its driver, its memory, what its errors mean. Through cuda-bindings,
never torch.

A process computes on one GPU, CUDA's first. `use_gpu` makes another one the first; a process for each GPU is
how several are used. Nothing below this file knows a GPU by its number, and no context is opened on another
one.
"""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ffl_deploy.errors import CheckError, DeviceLost, UsageError
from ffl_deploy.installed import missing

DRIVER = Path("/proc/driver/nvidia/version")
VISIBLE = "CUDA_VISIBLE_DEVICES"
ONNX_INSTEAD = "use the bundle's ONNX variants here: --variant fp32 --runtime onnxruntime"
STICKY = {
    "cudaErrorECCUncorrectable": 214,
    "cudaErrorContained": 226,
    "cudaErrorIllegalAddress": 700,
    "cudaErrorLaunchTimeout": 702,
    "cudaErrorAssert": 710,
    "cudaErrorHardwareStackError": 714,
    "cudaErrorIllegalInstruction": 715,
    "cudaErrorMisalignedAddress": 716,
    "cudaErrorInvalidAddressSpace": 717,
    "cudaErrorInvalidPc": 718,
    "cudaErrorLaunchFailure": 719,
    "cudaErrorTensorMemoryLeak": 721,
}
"""Errors after which CUDA answers every further call of the process with an error too, with their numbers
(its documentation: "the process must be terminated and relaunched")."""


class Gpu(NamedTuple):
    """What decides which engines run here, and how fast."""

    name: str
    capability: tuple[int, int]
    driver: str  # its number; where only that is known, the CUDA that it is for

    @property
    def compute_capability(self) -> str:
        return f"{self.capability[0]}.{self.capability[1]}"

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability}, driver {self.driver})"


class Memory(NamedTuple):
    """Bytes of the GPU's own memory; what other processes hold there counts as used."""

    used: int
    total: int


def import_cuda() -> Any:
    """-> the runtime API of cuda-bindings. Raises UsageError where it is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise missing("cuda") from error
    return runtime


def this_gpu(advice: str = ONNX_INSTEAD) -> Gpu:
    """-> the GPU that this process computes on.

    Raises UsageError, which ends with `advice`, where there is none that can be used.
    """
    cuda = import_cuda()
    status, count = cuda.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        raise UsageError(f"{_why_none(cuda, status)}; {advice}.")
    found = checked(cuda, cuda.cudaGetDeviceProperties(0))
    name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
    return Gpu(name.rstrip("\0"), (int(found.major), int(found.minor)), driver(cuda))


def driver(cuda: Any) -> str:
    """-> "580.65.06"; "for CUDA 13.0" where the kernel module does not say."""
    try:
        found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", DRIVER.read_text())
    except OSError:
        found = None
    return found[1] if found else f"for CUDA {_cuda_version(_driver_version(cuda))}"


def _driver_version(cuda: Any) -> int:
    """-> the newest CUDA that the driver is for, as 13000; 0 where there is no driver."""
    status, version = cuda.cudaDriverGetVersion()
    return int(version) if int(status) == 0 and version else 0


def _cuda_version(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _why_none(cuda: Any, status: Any) -> str:
    """-> why there is no GPU to compute on."""
    if os.environ.get(VISIBLE) in ("", "-1"):
        return f"no NVIDIA GPU is visible, because {VISIBLE} is set to nothing: unset it"
    found = _driver_version(cuda)
    if found == 0:
        return "there is no NVIDIA driver on this machine, so no GPU to compute on"
    if status.name == "cudaErrorInsufficientDriver":
        own = int(cuda.cudaRuntimeGetVersion()[1])
        return (
            f"the NVIDIA driver is for CUDA {_cuda_version(found)} and too old for the installed CUDA "
            f"{_cuda_version(own)}: install a newer driver, or the extras for CUDA {found // 1000} "
            "(docs/gpu.md)"
        )
    return f"there is no NVIDIA GPU that can be used ({status.name})"


def use_gpu(number: int) -> None:
    """Make the GPU `number` the only one that this process, and what it starts, sees; before CUDA is used.

    Numbers are those of nvidia-smi, or positions in CUDA_VISIBLE_DEVICES where that is set. Raises UsageError
    where there is no such GPU.
    """
    os.environ[VISIBLE] = visible_gpu(number)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def visible_gpu(number: int) -> str:
    """-> what CUDA_VISIBLE_DEVICES has to be for the GPU `number` alone. Raises UsageError."""
    if number < 0:
        raise UsageError(f"there is no GPU {number}; they are counted from 0.")
    given = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    if VISIBLE not in os.environ:
        return str(number)
    if number >= len(given):
        raise UsageError(
            f"there is no GPU {number} among the {len(given)} of {VISIBLE}={os.environ[VISIBLE]}; they are "
            "counted from 0."
        )
    return given[number]


def gpu_count(advice: str = ONNX_INSTEAD) -> int:
    """-> how many GPUs this process sees, at least 1. Raises UsageError where there is none.

    It opens no context on any of them.
    """
    cuda = import_cuda()
    status, count = cuda.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        raise UsageError(f"{_why_none(cuda, status)}; {advice}.")
    return int(count)


def memory() -> Memory | None:
    """-> of the GPU that this process computes on; None where that cannot be told."""
    try:
        free, total = memory_info(import_cuda())
    except (UsageError, CheckError):
        return None
    return Memory(total - free, total)


def memory_info(cuda: Any) -> tuple[int, int]:
    """-> (free, total) bytes. Raises CheckError."""
    status, free, total = cuda.cudaMemGetInfo()
    checked(cuda, (status,))
    return int(free), int(total)


def pinned_bytes(cuda: Any, size: int, held: ExitStack) -> np.ndarray:
    """-> uint8 [size] in memory of the host that the GPU copies from and to without a detour; `held` frees
    it.

    Raises CheckError where there is no more of it.
    """
    pointer = checked(cuda, cuda.cudaHostAlloc(size, 0))
    held.callback(cuda.cudaFreeHost, pointer)
    return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(int(pointer)))


def checked(cuda: Any, answer: tuple[Any, ...]) -> Any:
    """cuda-bindings' (status, value...) -> value.

    Raises CheckError with CUDA's own name and text of the error, DeviceLost for one after which the process
    can use the GPU no more.
    """
    status, *values = answer
    if int(status) != 0:
        _, text = cuda.cudaGetErrorString(status)
        said = f"{status.name} ({text.decode() if isinstance(text, bytes) else text})"
        if status.name in STICKY:
            raise DeviceLost(f"the GPU failed: {said}; start the command again.")
        raise CheckError(f"CUDA failed: {said}.")
    return values[0] if values else None


def identity() -> dict[str, str]:
    """-> {"gpu": what decides the answers of this machine's}, {} where cuda-bindings is not there to ask.

    Raises UsageError where there is no GPU that can be used.
    """
    try:
        import cuda.bindings.runtime  # noqa: F401
    except ImportError:
        return {}
    return {"gpu": str(this_gpu())}


@cache
def described() -> str:
    """-> the GPU's name and capability for people, "GPU" where cuda-bindings is not there to ask."""
    try:
        gpu = this_gpu()
    except (UsageError, CheckError):
        return "GPU"
    return f"{gpu.name} ({gpu.compute_capability})"
