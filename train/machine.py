"""Where a run computes: device, arithmetic, processes."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.host import device_failed, keep_freed_memory, out_of_memory
from train.config import MachineOptions
from train.distributed import World
from train.nvidia import driver_is_loaded, why_torch_has_no_gpu

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Where a process of a run computes: its device and arithmetic, and its place among the other processes.

    precision is what is used, not what was asked for: "fp32", "bf16" or "fp16". searches: whether cuDNN tries
    out its algorithms for the shapes that most steps have.
    """

    device: torch.device
    precision: str
    world: World = field(default_factory=World)
    searches: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        """Forward passes run inside; convolutions and linear layers then compute in `precision`."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_TYPES[self.precision])

    @contextmanager
    def searching(self, wanted: bool = True) -> Iterator[None]:
        """In the block, cuDNN tries out its algorithms for every shape that it has not seen, if this place
        searches; elsewhere it takes the one that it expects to be fastest."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = wanted and self.searches
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before

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
    repeat_every_bit(options.deterministic)  # before CUDA starts
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    return device


def repeat_every_bit(wanted: bool) -> None:
    """Whether a GPU is to use algorithms alone that add in the same order every time."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(wanted)
    # a search for bugs, no part of the result
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def why_no_gpu(world: World) -> str:
    """-> why this torch cannot train on the GPU that this process would take; empty where it can."""
    with warnings.catch_warnings():  # of torch, in several lines; the reason is told below, in one
        warnings.simplefilter("ignore")
        available = torch.cuda.is_available()
    if not available:
        return why_torch_has_no_gpu()
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


@contextmanager
def resources_in_one_sentence(options: MachineOptions) -> Iterator[None]:
    """Turn torch's errors about memory, and about a compiler that is not there, into a CheckError."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().split("\n")[0]
        if out_of_memory(error):
            needed = first.partition(" GPU ")[0].rstrip(
                "."
            )  # the rest counts bytes and gives torch's own advice
            raise CheckError(
                f"out of memory ({needed}); use a smaller --batch-size, or --accumulate 2 or more, which "
                "keeps the step."
            ) from error
        if device_failed(error):
            raise CheckError(
                f"the GPU failed ({first}); the last checkpoint is kept: run again with --resume, or with "
                "--device cpu."
            ) from error
        if "DataLoader worker" in first or "DataLoader timed out" in first:
            # torch raises it wherever the main process is when the signal comes
            raise CheckError(decoding_failed(first)) from error
        if "does not have a deterministic implementation" in first:
            raise UsageError(
                f"--deterministic: {first.split(' does not')[0]} has no deterministic implementation on a "
                "GPU; leave the flag out, or choose other --branches."
            ) from error
        if options.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise CheckError(
                f"--compile failed ({first}); leave it out, or install what it needs."
            ) from error
        raise


def decoding_failed(reason: str) -> str:
    """-> the sentence for torch's `reason` why a process that decodes images gives no more of them."""
    if "timed out" in reason or "shared memory" in reason or "shm" in reason:
        return (
            "the processes that decode images stand still, since /dev/shm is full or the disk does not "
            "answer; free it (docker run --shm-size=2g), or go on with --resume and fewer --workers, 0 for "
            "none."
        )
    return (
        "a process that decodes images was killed, probably for want of memory; go on with --resume and "
        "fewer --workers."
    )


def require_possible(options: MachineOptions, device: torch.device, world: World) -> None:
    """Raise UsageError for options that this device cannot follow."""
    if device.type == "cpu" and options.precision == "fp16":
        raise UsageError("--precision fp16 needs a GPU; CPUs train in fp32, or in bf16 where that is faster.")
    why = why_no_graph(device, world)
    if options.cuda_graph == "on" and why:
        raise UsageError(f"--cuda-graph on {why}; leave it out.")


def why_no_graph(device: torch.device, world: World) -> str:
    """-> why no step of this process can be captured as a CUDA graph; empty where one can."""
    if device.type != "cuda":
        return "needs an NVIDIA GPU"
    return "is for one process, and several share this run" if world.size > 1 else ""


SEARCH_FROM = 20_000
"""Steps of a run from which cuDNN searches its algorithms. On an H100 that took 6 seconds for a shape, more
than a thousand steps of two ResNet-32, which were no faster for it (docs/gpu-acceptance.md); other networks
may be."""


def searches(options: MachineOptions, device: torch.device, steps: int) -> bool:
    """-> whether cuDNN is to try out its algorithms in a run of `steps` steps."""
    return device.type == "cuda" and not options.deterministic and steps >= SEARCH_FROM


def choose_place(
    wanted: str,
    device: torch.device,
    world: World,
    fastest: Callable[[Place], str] | None = None,
    searches: bool = False,
) -> Place:
    """wanted: a precision or "auto", which every process of `world` resolves alike. fastest: measures the
    precisions of a GPU; without it `auto` is bf16 there, or fp16 where there is none. searches: as Place's.

    bf16 is taken at its word everywhere: a CPU without it emulates it, slowly.
    """
    if wanted != "auto":
        return Place(device, wanted, world, searches)
    if device.type == "cuda":
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        place = Place(device, half, world, searches)
        return place if fastest is None else replace(place, precision=fastest(place))
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
