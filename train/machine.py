"""Where a run computes: device, arithmetic, processes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.host import device_failed, keep_freed_memory, out_of_memory
from train.config import MachineOptions
from train.distributed import World

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Where a process of a run computes: its device and arithmetic, and its place among the other processes.

    precision is what is used, not what was asked for: "fp32", "bf16" or "fp16".
    """

    device: torch.device
    precision: str
    world: World = field(default_factory=World)

    def autocast(self) -> AbstractContextManager[Any]:
        """Forward passes run inside; convolutions and linear layers then compute in `precision`."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_TYPES[self.precision])

    @contextmanager
    def exact(self) -> Iterator[Place]:
        """The same place in full precision while the block runs: without autocast, and without the TF32 (10
        bits of mantissa) in which GPUs since Ampere compute fp32 unless they are told not to."""
        convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        try:
            yield replace(self, precision="fp32")
        finally:
            torch.backends.cudnn.allow_tf32 = convolutions
            torch.set_float32_matmul_precision(products)

    def any(self, flag: bool) -> bool:
        """-> whether `flag` is set on any process; all of them have to ask at the same step."""
        return self.world.any(flag, self.device)


def choose_device(options: MachineOptions, world: World) -> torch.device:
    """Resolve `auto` and set torch up for this process. Raises UsageError for a GPU that is not there."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    reason = "" if options.device == "cpu" else why_no_gpu(world)
    if options.device == "cuda" and reason:
        raise UsageError(f"--device cuda: {reason}; use --device cpu.")
    if reason and driver_is_loaded():  # there is a GPU, and it would have been faster
        print(f"training on the CPU: {reason}.", file=sys.stderr, flush=True)
    if options.device == "cpu" or reason:
        keep_freed_memory()
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"{world.size} processes but {torch.cuda.device_count()} GPUs; lower --nproc-per-node."
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # shapes are the same every step
    torch.set_float32_matmul_precision("high")
    return device


def why_no_gpu(world: World) -> str:
    """-> why this torch cannot train on the GPU that this process would take; empty where it can."""
    if not torch.cuda.is_available():
        if not torch.backends.cuda.is_built():
            return "this torch is built without CUDA; install a CUDA build"
        if driver_is_loaded():
            needed = torch.version.cuda
            return (
                f"the NVIDIA driver is too old for the CUDA {needed} of this torch; update it, or install "
                "an older torch"
            )
        return "torch finds no usable NVIDIA GPU here"
    if world.local_rank >= torch.cuda.device_count():
        return ""  # told with the number of processes
    major, minor = torch.cuda.get_device_capability(world.local_rank)
    built = [name for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    # A binary runs on GPUs of its own generation that are not older than it.
    numbers = [int(name.removeprefix("sm_").rstrip("af")) for name in built]
    if numbers and not any(number // 10 == major and number % 10 <= minor for number in numbers):
        return (
            f"torch {torch.__version__} has no code for this GPU's compute capability {major}.{minor} "
            f"(it has {', '.join(built)}); install another torch"
        )
    return ""


def driver_is_loaded() -> bool:
    """-> whether this machine runs NVIDIA's driver, whatever torch makes of it."""
    return Path("/proc/driver/nvidia/version").exists()


@contextmanager
def resources_in_one_sentence(options: MachineOptions) -> Iterator[None]:
    """Turn torch's errors about memory, and about a compiler that is not there, into a CheckError."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().split("\n")[0]
        if out_of_memory(error):
            raise CheckError(
                f"out of memory ({first}); use a smaller --batch-size, or --accumulate 2 or more, which "
                "keeps the step."
            ) from error
        if device_failed(error):
            raise CheckError(
                f"the GPU failed ({first}); the last checkpoint is kept: run again with --resume, or with "
                "--device cpu."
            ) from error
        if options.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise CheckError(
                f"--compile failed ({first}); leave it out, or install what it needs."
            ) from error
        raise


def choose_place(wanted: str, device: torch.device, world: World) -> Place:
    """wanted: a precision or "auto", which every process of `world` resolves alike.
    Raises UsageError for fp16 on a CPU.

    bf16 is taken at its word everywhere: a CPU without it emulates it, slowly.
    """
    if device.type == "cpu" and wanted == "fp16":
        raise UsageError("--precision fp16 needs a GPU; CPUs train in fp32, or in bf16 where that is faster.")
    if wanted != "auto":
        return Place(device, wanted, world)
    if device.type == "cuda":
        return Place(
            device, "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16", world
        )
    return Place(device, world.agree("bf16" if bf16_speed_up() >= WORTH_IT else "fp32"), world)


WORTH_IT = 1.2
"""Speed-up from which a CPU trains in bf16: less is not worth its rounding,
and near 1 the choice would vary from run to run."""


def bf16_speed_up() -> float:
    """-> time of a convolution's forward and backward pass in fp32 over that in bf16;
    0 where bf16 would be emulated.

    Measured, in less than a second, since processors that have the instructions differ: twice as fast on
    some, on others (AVX-512 BF16 on several Xeons without AMX) half as fast.
    """
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if not any(getattr(torch.cpu, name, lambda: False)() for name in checks):
        return 0.0
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    with torch.random.fork_rng(devices=[]):
        passes = {kind: _convolution(kind) for kind in seconds}
    for _ in range(15):  # in turns, and the best of each, so that other work on the machine does not decide
        for kind, both_ways in passes.items():
            started = time.perf_counter()
            both_ways()
            seconds[kind].append(time.perf_counter() - started)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def _convolution(kind: torch.dtype) -> Callable[[], None]:
    """-> what runs a 3x3 convolution of 32 channels forwards and backwards in `kind`."""
    images = torch.randn(32, 32, 16, 16).to(kind, memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(32, 32, 3, 3).to(kind, memory_format=torch.channels_last).requires_grad_()
    gradient = torch.ones_like(images)

    def both_ways() -> None:
        torch.autograd.grad(functional.conv2d(images, weight, padding=1), (images, weight), gradient)

    return both_ways
