"""Training throughput, end to end with data loading: the official FFL code against this trainer, in turns.

    git clone https://github.com/Jangho-Kim/FFL-pytorch official
    python -m benchmarks.train_vs_official --official official --data CIFAR100_FOLDER [--blocks 8]
    [--steps 40] [--json OUT]

FFL ResNet-32, CIFAR-100, batch 128, the paper's recipe on both sides. Each side lives in a process of its own
and works in blocks while the other one sleeps: A B A B ... Its own training function does the work, unchanged
(official.py; train/loop.py); the clock starts and stops where that function asks for its next batch. The last
line is the official time over ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flags import two_sides_parser
from ffl_deploy import markdown
from ffl_deploy.command import run_command
from ffl_deploy.host import available_cores
from ffl_deploy.runtime.latency import machine_name

WARM_UP = 5  # steps at the start of each block that do not count: worker processes start, queues fill
SIDES = ("official", "ours")


class Blocks:
    """Wraps a stream of batches: waits for a command before each block, and reports how long the block took.

    A block's time runs from the request after its warm-up to the request after its last step, all work done.
    """

    def __init__(self, steps: int, synchronize: Any) -> None:
        self.steps, self.synchronize = steps, synchronize

    def __call__(self, batches: Iterator[Any]) -> Iterator[Any]:
        """One block: wait, hand over warm-up and `steps` batches, report."""
        if sys.stdin.readline().strip() != "go":
            raise SystemExit(0)
        for _ in range(WARM_UP):
            yield next(batches)
        self.synchronize()
        started, loading = time.perf_counter(), 0.0
        for _ in range(self.steps):
            asked = time.perf_counter()
            batch = next(batches)
            loading += time.perf_counter() - asked
            yield batch
        self.synchronize()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds / self.steps, "loading": loading / self.steps}), flush=True)


def be_official(clone: Path, data: Path, device: str, steps: int) -> None:
    """The official side: one call of its `train` per block, on its own DataLoader with its four workers."""
    import torch

    from benchmarks.official import cifar_images, endless, official_training

    chosen = torch.device(device)
    training = official_training(clone, cifar_images(data), chosen, seed=0)
    blocks = Blocks(steps, synchronizer(chosen))
    print(json.dumps({"precision": "fp32"}), flush=True)
    while True:
        # The loader's iterator lives as long as the block:
        # its workers must not read ahead in the other side's time.
        training.run(blocks(endless(training.trainloader, steps + WARM_UP)), 100)


def be_ours(data: Path, device: str, steps: int, scratch: Path, compiled: bool) -> None:
    """Our side: `Trainer` itself, on a source of batches that pauses between blocks."""
    from benchmarks.official import cifar_images, our_training

    training = our_training(cifar_images(data), device, seed=0)
    if compiled:
        training.network.compile()
    blocks, epochs = Blocks(steps, synchronizer(training.place.device)), training.batches.training

    def paused(epoch: int, first_step: int) -> Iterator[Any]:
        stream = (micro for number in range(10**6) for micro in epochs(number, 0))
        while True:
            yield from blocks(stream)

    training.batches.training = paused  # type: ignore[method-assign]
    print(json.dumps({"precision": training.place.precision}), flush=True)
    training.fit(scratch)


def synchronizer(device: Any) -> Any:
    """-> what waits until `device` has done all its work."""
    import torch

    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


class Side:
    """A process of one of the sides, and the peak of its memory together with that of its workers."""

    def __init__(self, name: str, arguments: argparse.Namespace, scratch: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "benchmarks.train_vs_official",
            "--role",
            name,
            "--scratch",
            str(scratch),
        ]
        for flag in ("official", "data", "device", "steps"):
            command += [f"--{flag}", str(getattr(arguments, flag))]
        if arguments.compile:
            command.append("--compile")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.peak = 0
        self.precision = self.answer()["precision"]

    def block(self) -> dict[str, float]:
        """Run one block; -> seconds and seconds of waiting for data, per step."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        done = threading.Event()
        watcher = threading.Thread(target=self.watch, args=(done,))
        watcher.start()
        try:
            return self.answer()
        finally:
            done.set()
            watcher.join()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended early (exit code {self.process.wait()}); its message is above.")
        return json.loads(line)

    def watch(self, done: threading.Event) -> None:
        while not done.wait(0.5):
            self.peak = max(self.peak, proportional_memory(self.process.pid))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def proportional_memory(root: int) -> int:
    """-> MiB of a process and its children; pages that they share count once (Linux's PSS). 0 elsewhere."""
    total, open_pids = 0, [root]
    while open_pids:
        pid = open_pids.pop()
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            open_pids += [
                int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            ]
        except (OSError, ValueError):  # it ended meanwhile
            continue
    return total // 1024


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let both sides work in turns; -> everything that the table shows."""
    with tempfile.TemporaryDirectory() as scratch:
        sides = {name: Side(name, arguments, Path(scratch)) for name in SIDES}
        try:
            blocks: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
            for turn in range(arguments.blocks + 1):
                for name, side in sides.items():
                    block = side.block()
                    if turn:  # the first turn warms up
                        blocks[name].append(block)
                        print(
                            f"block {turn:2d}  {name:8s} {block['seconds'] * 1e3:6.0f} ms a step",
                            file=sys.stderr,
                        )
        finally:
            for side in sides.values():
                side.end()
    ratios = [
        theirs["seconds"] / ours["seconds"]
        for theirs, ours in zip(blocks["official"], blocks["ours"], strict=True)
    ]
    return {
        "machine": f"{available_cores()} cores of {machine_name()}",
        "device": arguments.device,
        "date": time.strftime("%Y-%m-%d"),
        "batch": 128,
        "steps_per_block": arguments.steps,
        "compiled": arguments.compile,
        "precision": {name: side.precision for name, side in sides.items()},
        "peak_mib": {name: side.peak for name, side in sides.items()},
        "blocks": blocks,
        "ratios": ratios,
        "ratio": float(np.median(ratios)),
    }


def table(result: dict[str, Any]) -> str:
    rows = []
    for name in SIDES:
        seconds = np.array([block["seconds"] for block in result["blocks"][name]])
        loading = np.array([block["loading"] for block in result["blocks"][name]])
        low, middle, high = np.percentile(seconds, [25, 50, 75]) * 1e3
        rows.append(
            [
                name,
                result["precision"][name],
                f"{middle:.0f}",
                f"{low:.0f}-{high:.0f}",
                f"{128e3 / middle:.0f}",
                f"{np.median(loading / seconds):.1%}",
                f"{result['peak_mib'][name]} MiB",
            ]
        )
    return markdown.table(
        ["", "precision", "ms a step", "quartiles", "images/s", "waiting for data", "peak memory"], rows
    )


def main(argv: list[str]) -> int:
    """-> exit code."""
    parser = two_sides_parser(__doc__)
    parser.add_argument("--blocks", type=int, default=8, help="counted blocks of each side")
    parser.add_argument("--steps", type=int, default=40, help="counted steps of a block")
    parser.add_argument("--compile", action="store_true", help="compile our network (torch.compile)")
    parser.add_argument("--role", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.role == "official":
        be_official(arguments.official, arguments.data, arguments.device, arguments.steps)
    elif arguments.role == "ours":
        be_ours(arguments.data, arguments.device, arguments.steps, arguments.scratch, arguments.compile)
    else:
        result = compare(arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
        low, high = np.percentile(result["ratios"], [25, 75])
        print(
            f"\n{table(result)}\n\nblock by block: quartiles {low:.2f}-{high:.2f}, {len(result['ratios'])} "
            "pairs"
        )
        print(f"ratio: {result['ratio']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
