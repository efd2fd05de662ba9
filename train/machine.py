"""Device and arithmetic of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ffl_deploy.errors import UsageError
from train.config import MachineOptions
from train.distributed import World

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """precision is what is used, not what was asked for: "fp32", "bf16" or "fp16"."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[Any]:
        """Forward passes run inside; convolutions and linear layers then compute in `precision`."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_TYPES[self.precision])

    def exact(self) -> Machine:
        """The same device in full precision."""
        return Machine(self.device, "fp32")


def choose_machine(options: MachineOptions, world: World) -> Machine:
    """Resolve "auto" and set torch up for this process.

    Raises UsageError for a GPU that is not there or a precision that the processor does not have.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise UsageError("--device cuda: torch finds no usable NVIDIA GPU here; use --device cpu, or install a CUDA build.")
    if options.device == "cpu" or not has_gpu:
        device = torch.device("cpu")
        fast_bf16 = cpu_has_bf16()
        if options.precision == "fp16":
            raise UsageError("--precision fp16 needs a GPU; CPUs train in fp32, or in bf16 where they have it.")
        automatic = "bf16" if fast_bf16 else "fp32"
    else:
        if world.local_rank >= torch.cuda.device_count():
            raise UsageError(f"{world.size} processes but {torch.cuda.device_count()} GPUs; lower --nproc-per-node.")
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes are the same every step
        torch.set_float32_matmul_precision("high")
        automatic = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return Machine(device, automatic if options.precision == "auto" else options.precision)


def cpu_has_bf16() -> bool:
    """-> whether this CPU multiplies bf16 natively (AVX-512 BF16 or AMX); emulation would be slower than fp32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
