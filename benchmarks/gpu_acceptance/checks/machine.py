"""Which machine this is, and what it has."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess

import torch

from benchmarks.gpu_acceptance.report import Context
from train.nvidia import why_torch_has_no_gpu

PACKAGES = (
    "torch", "torchvision", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "cuda-bindings",
    "timm", "safetensors", "scikit-learn", "msgspec", "simplejpeg", "pyarrow", "pytest",
)  # fmt: skip
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,mig.mode.current"


def run(context: Context) -> None:
    report = context.report
    report.note(
        device=context.device, cores=len(os.sched_getaffinity(0)), python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES}, cuda=torch.version.cuda,
    )  # fmt: skip
    if context.gpu:
        major, minor = torch.cuda.get_device_capability()
        free, total = torch.cuda.mem_get_info()
        report.note(
            gpu=torch.cuda.get_device_name(), capability=f"{major}.{minor}", gpus=torch.cuda.device_count(),
            free_mib=free >> 20, total_mib=total >> 20, cudnn=torch.backends.cudnn.version(),
        )  # fmt: skip
        report.must("the GPU adds", float(torch.ones(4, device="cuda").sum()) == 4.0)
    else:
        report.leave_out(f"all that needs a GPU: {why_torch_has_no_gpu()}")
    if shutil.which("nvidia-smi"):
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        report.note(nvidia_smi=said.stdout.strip().splitlines())
    if context.data is None:
        report.leave_out("CIFAR-100: no --data")


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
