"""What NVIDIA's driver says of itself, asked of its own library: why torch finds no GPU, it does not tell."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def driver_is_loaded() -> bool:
    """-> whether this machine runs NVIDIA's driver, whatever torch makes of it."""
    return Path("/proc/driver/nvidia/version").exists()


def library() -> ctypes.CDLL | None:
    """-> the driver's library, None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def newest_cuda(driver: ctypes.CDLL) -> tuple[int, int]:
    """-> the newest CUDA that the driver can run; (0, 0) where it does not say."""
    version = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return 0, 0
    return version.value // 1000, version.value % 1000 // 10


def why_torch_has_no_gpu() -> str:
    """-> why torch can use no NVIDIA GPU here, and what to do; for a machine where torch finds none."""
    needed = torch.version.cuda
    if needed is None or not torch.backends.cuda.is_built():
        return "this torch is built without CUDA; install a CUDA build"
    driver = library()
    if driver is None:
        if driver_is_loaded():
            return "the NVIDIA driver's libcuda.so.1 is not found; start the container with its GPUs"
        return "torch finds no usable NVIDIA GPU here"
    major, minor = newest_cuda(driver)
    if major < int(needed.split(".")[0]):
        return (
            f"the NVIDIA driver is too old for the CUDA {needed} of this torch (it runs up to CUDA "
            f"{major}.{minor}); update it, or install an older torch"
        )
    started = driver.cuInit(0)
    if started not in (0, NO_DEVICE):
        return f"CUDA does not start ({error_name(driver, started)}); restart the driver or the machine"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden} leaves no NVIDIA GPU; unset it"
    return "the NVIDIA driver finds no GPU; ask nvidia-smi for one that is lost"


def error_name(driver: ctypes.CDLL, code: int) -> str:
    """-> the driver's name of an error, as CUDA_ERROR_SYSTEM_NOT_READY."""
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {code}"
