"""What decides which kernels compute here, as text: where two texts are equal,
a checked answer counts for both.

Under an emulator (qemu-user) the operating system describes the host's processor, while programs run on the
emulated one. So NumPy is asked too, which executes CPUID itself, and ONNX Runtime's own kernels are tried on
a product that shows whether they saturate. A verdict of the one then never counts for the other.
"""

from __future__ import annotations

import importlib
import os
import platform
from functools import cache
from pathlib import Path

import numpy as np

from ffl_deploy.runtime import computes_on_cpu

CPUINFO = Path("/proc/cpuinfo")
NVIDIA = Path("/proc/driver/nvidia")
X86 = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
ARM = ("Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision")
OTHERS = ("cpu", "isa", "uarch", "machine")  # POWER, RISC-V
DESCRIBING = frozenset((*X86, *ARM, *OTHERS))
"""Lines of /proc/cpuinfo that say what the processor is;
the others say how it is wired and how fast it happens to run."""
SWITCHES = (
    "ONEDNN_MAX_CPU_ISA",  # oneDNN, inside OpenVINO
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "NVIDIA_TF32_OVERRIDE",
    "CUDA_VISIBLE_DEVICES",
)
"""Environment variables by which a user has a runtime compute otherwise."""
PAIR = (
    b'\x08\x04:V\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01p*\r\x08\x02\x08\x01\x10\x03B\x01bJ\x02\x7f\x7f'
    b"Z\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02\x08\x01\n\x02\x08\x02"
    b"b\x13\n\x01y\x12\x0e\n\x0c\x08\x06\x12\x08\n\x02\x08\x01\n\x02\x08\x01B\x04\n\x00\x10\n"
)
"""An ONNX file: MatMulInteger of a, uint8 [1, 2], with int8 [[127], [127]]. Kernels that add pairs in 16 bits
give 32767 for a = [255, 255], the others 64770."""


def kernels(runtime: str) -> dict[str, str] | None:
    """-> what the answers of `runtime` depend on besides its version, its threads and the file;
    None where that is not known.

    A GPU is described by NVIDIA's driver; where it does not say which it is,
    nothing may be remembered of its answers.
    """
    described = {
        "machine": platform.machine(),
        "cpuinfo": cpuinfo(),
        "features": features(),
        "switches": switches(),
    }
    if runtime.startswith("onnxruntime"):
        described["pair_sum"] = pair_sum()
    if not computes_on_cpu(runtime):
        gpu = nvidia()
        return described | {"gpu": gpu} if gpu else None
    return described


@cache
def cpuinfo() -> str:
    """-> what the operating system says of the first processor, "" where it says nothing there."""
    lines = []
    try:
        with open(CPUINFO, encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    break  # the end of the first processor: on 256 cores the file takes a while
                name, _, value = line.partition(":")
                if name.strip() in DESCRIBING:
                    lines.append(f"{name.strip()}: {value.strip()}")
    except OSError:
        return ""
    return "\n".join(lines)


@cache
def features() -> str:
    """-> the instruction sets that NumPy found by asking the processor itself."""
    for module in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        try:
            found: dict[str, bool] = importlib.import_module(module).__cpu_features__
        except (ImportError, AttributeError):
            continue
        return " ".join(sorted(name for name, there in found.items() if there))
    return ""


@cache
def pair_sum() -> str:
    """-> what ONNX Runtime's int8 kernels make of 255 * 127 + 255 * 127: "64770", or what it saturates to."""
    from ffl_deploy.runtime import import_onnxruntime

    try:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1  # none has to be started for it
        session = ort.InferenceSession(PAIR, options, providers=["CPUExecutionProvider"])
        return str(int(session.run(["y"], {"a": np.full((1, 2), 255, np.uint8)})[0][0, 0]))
    except Exception as error:  # ONNX Runtime's exceptions have no common public base
        return type(error).__name__


def switches() -> str:
    return " ".join(f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ)


def nvidia() -> str:
    """-> driver and GPUs, "" where they are not known."""
    try:
        driver = (NVIDIA / "version").read_text()
        gpus = [path.read_text() for path in sorted(NVIDIA.glob("gpus/*/information"))]
    except OSError:
        return ""
    wanted = ("Model", "GPU UUID", "Video BIOS", "GPU Firmware")
    lines = [line.strip() for text in gpus for line in text.splitlines() if line.startswith(wanted)]
    return "\n".join([driver.strip(), *lines]) if lines else ""


LEVELS = {
    "AVX512F": "AVX-512",
    "AVX2": "AVX2",
    "AVX": "AVX",
    "SSE42": "SSE4.2",
    "SVE": "SVE",
    "ASIMD": "NEON",
}
"""NumPy's name of an instruction set -> the field's, the widest first."""


def description() -> str:
    """-> what decides the answers here, without the processor's name: "x86_64 AVX2, int8 pairs saturate".

    Of the processor that this program runs on, which under an emulator is the emulated one.
    """
    found = set(features().split())
    level = next((name for key, name in LEVELS.items() if key in found), "")
    pairs = {"64770": "int8 pairs exact", "32767": "int8 pairs saturate"}.get(
        pair_sum(), "int8 pairs not known"
    )
    return f"{' '.join(filter(None, (platform.machine(), level)))}, {pairs}"
