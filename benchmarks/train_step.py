"""One training step of FFL ResNet-32 (100 classes, 32x32, batch 128): where its time goes,
and what each way to save some brings.

    python -m benchmarks.train_step [--rounds 12] [--compile] [--json OUT]
    python -m benchmarks.train_step --device cuda [--json OUT]

The variants take turns in one process and are compared round by round; the allocator's setting belongs to a
process, so that two processes take turns for it. Random images: speed does not depend on them.

On a GPU: what a step launches, copies and waits for, in fp32 and bf16, as it is and as a CUDA graph; the
share of the time that its kernels alone take is how near it is to its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.gpu_acceptance.checks.bound import replays
from benchmarks.gpu_acceptance.checks.waits import profiled, waited
from benchmarks.gpu_acceptance.images import decoded
from benchmarks.gpu_acceptance.training import Setting, Training
from ffl_deploy.command import run_command
from ffl_deploy.errors import UsageError
from ffl_deploy.host import keep_freed_memory
from ffl_deploy.markdown import table
from ffl_deploy.networks import resnet
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from train.config import OptimisationOptions
from train.methods import build_method
from train.nvidia import why_torch_has_no_gpu
from train.optimizer import build_optimizer

BATCH = 128
GROUPS = {
    "convolution, forward": ("aten::mkldnn_convolution", "aten::cudnn_convolution"),
    "convolution, backward": ("aten::convolution_backward",),
    "batch normalisation": ("aten::native_batch_norm", "aten::native_batch_norm_backward"),
    "ReLU": ("aten::clamp_min", "aten::clamp_min_", "aten::threshold_backward"),
    "additions": ("aten::add", "aten::add_"),
    "optimiser": ("aten::_fused_sgd_",),
}
Step = Callable[[], None]


def out_of_place(block: resnet.BasicBlock, x: torch.Tensor) -> torch.Tensor:
    """BasicBlock.forward as it is usually written."""
    shortcut = x if block.downsample is None else block.downsample(x)
    out = functional.relu(block.bn1(block.conv1(x)))
    return functional.relu(block.bn2(block.conv2(out)) + shortcut)


def build(
    size: int = 32,
    layout: torch.memory_format = torch.channels_last,
    bf16: bool = False,
    compiled: bool = False,
) -> Step:
    """-> one whole step: forward, losses, backward, optimiser."""
    torch.manual_seed(0)
    network = (
        MutualNetwork(NetworkConfig(("resnet32", "resnet32"), 100, 32, 32)).train().to(memory_format=layout)
    )
    optimizer, method = build_optimizer(network, OptimisationOptions()), build_method("ffl")
    images = torch.randn(BATCH, 3, size, size).contiguous(memory_format=layout)
    labels = torch.randint(100, (BATCH,))
    if compiled:
        network.compile()

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
            outputs = network(images)
        torch.stack(list(method.losses(outputs, labels, 1.0).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@contextlib.contextmanager
def replaced(forward: Any) -> Iterator[None]:
    own = resnet.BasicBlock.forward
    resnet.BasicBlock.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        resnet.BasicBlock.forward = own  # type: ignore[method-assign]


def trained_step() -> Step:
    """-> a step of `Trainer`: with batch, seeds and meter."""
    data = decoded(None)
    return Training(data, "cpu", Setting("fp32", BATCH), Path(tempfile.mkdtemp())).step


def on_gpu(target: Path | None) -> int:
    """Print, and store in `target`, what a step does on a GPU; -> exit code."""
    if not torch.cuda.is_available():
        raise UsageError(f"--device cuda: {why_torch_has_no_gpu()}.")
    data, results = decoded(None), {}
    head = [
        "ms a step",
        "launches",
        "graph launches",
        "kernels",
        "copies",
        "waits",
        "busy share",
        "share of the bound",
    ]
    print(table(["step", *head], []))
    for precision in ("fp32", "bf16"):
        for graph in ("off", "on"):
            training = Training(data, "cuda", Setting(precision, BATCH, graph), Path(tempfile.mkdtemp()))
            training.seconds(40)  # warm: algorithms are chosen, steps captured
            seconds = float(np.median([training.seconds(20) for _ in range(5)]))
            with tempfile.TemporaryDirectory() as folder:
                found = profiled(training, Path(folder) / "trace.json")
            found |= {"ms a step": 1e3 * seconds, "waits": len(waited(training))}
            found["share of the bound"] = replays(training) / seconds if graph == "on" else None
            results[training.name] = found
            cells = ["-" if found[name] is None else f"{found[name]:.4g}" for name in head]
            print(f"| {training.name} | {' | '.join(cells)} |", flush=True)
    if target is not None:
        target.write_text(
            json.dumps({"gpu": torch.cuda.get_device_name(), "steps": results}, indent=2) + "\n"
        )
    return 0


def plain_blocks(step: Step) -> Step:
    def run() -> None:
        with replaced(out_of_place):
            step()

    return run


def in_turns(variants: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """-> variant -> seconds of each round, after two that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, step in variants.items():
            started = time.perf_counter()
            step()
            if turn > 1:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def allocator_child(tuned: bool) -> None:
    """One process of the allocator's comparison: a step for each line on standard input."""
    if tuned:
        keep_freed_memory()
    step = build()
    for _ in range(3):
        step()
    for _ in sys.stdin:
        faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults]), flush=True)


def compare_allocators(rounds: int) -> dict[str, np.ndarray]:
    """-> setting -> [rounds, 2]: seconds and page faults of a step."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--allocator"]
    children = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("default", "tuned")
    }
    found: dict[str, list[Any]] = {name: [] for name in children}
    for _ in range(rounds):
        for name, child in children.items():
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            found[name].append(json.loads(child.stdout.readline()))
    for child in children.values():
        child.communicate()
    return {name: np.array(rows) for name, rows in found.items()}


def profile(step: Step) -> dict[str, float]:
    """-> group of operators -> share of the step's time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        for _ in range(4):
            step()
    own = {event.key: event.self_cpu_time_total for event in recorded.key_averages()}
    total = sum(own.values())
    shares = {group: sum(own.get(name, 0) for name in names) / total for group, names in GROUPS.items()}
    return shares | {"everything else": 1 - sum(shares.values())}


def main(argv: list[str]) -> int:
    """-> exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too, which takes minutes to start"
    )
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--allocator", choices=["default", "tuned"], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.allocator:
        allocator_child(arguments.allocator == "tuned")
        return 0
    if arguments.device == "cuda":
        return on_gpu(arguments.json)
    allocators = compare_allocators(arguments.rounds)
    keep_freed_memory()
    base = build()
    variants = {
        "as trained (fp32, channels_last)": base,
        "by the trainer itself, with its data": trained_step(),
        "activations out of place": plain_blocks(build()),
        "contiguous layout (NCHW)": build(layout=torch.contiguous_format),
        "bf16": build(bf16=True),
        "24x24 pixels": build(size=24),
    }
    if arguments.compile:
        started = time.perf_counter()
        variants["torch.compile"] = build(compiled=True)
        variants["torch.compile"]()
        print(f"torch.compile: {time.perf_counter() - started:.0f} s to the first step", file=sys.stderr)
    seconds = in_turns(variants, arguments.rounds)
    reference = np.array(next(iter(seconds.values())))
    print("| variant | ms a step (median) | of the step as trained |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {1e3 * np.median(values):.0f} | {np.median(np.array(values) / reference):.2f} |")
    default, tuned = allocators["default"], allocators["tuned"]
    print(
        f"| allocator left as it is | {1e3 * np.median(default[:, 0]):.0f} | "
        f"{np.median(default[:, 0] / tuned[:, 0]):.2f} |\n\n"
        f"page faults a step: {np.median(default[:, 1]):.0f}, kept memory {np.median(tuned[:, 1]):.0f}\n"
    )
    shares = profile(base)
    print("| part of the step | share |\n|---|---|")
    for name, share in shares.items():
        print(f"| {name} | {share:.0%} |")
    if arguments.json:
        result = {
            "seconds": seconds,
            "allocators": {k: v.tolist() for k, v in allocators.items()},
            "profile": shares,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
