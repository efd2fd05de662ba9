"""Images a second: ours in every precision and way of launching, `auto`, and the official code, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_acceptance.images import decoded
from benchmarks.gpu_acceptance.report import Context
from benchmarks.gpu_acceptance.training import Setting, Training, wait
from train.config import OutputOptions, TrainConfig
from train.cuda_graph import TIMED, WARM
from train.precision import fastest_precision

NEAR = 1.05
NEEDED = 20  # seconds for one more setting
BATCHES = (128, 512, 1024)
Block = Callable[[], float]
"""Runs some steps; -> seconds of one."""


def run(context: Context) -> None:
    data, report = decoded(context.data, 60 if context.gpu else 2), context.report
    steps, rounds = (20, 3) if context.gpu else (1, 1)
    if not context.gpu:
        report.leave_out("CUDA graphs, fp16, torch.compile, larger batches: need a GPU")

    eager = {
        setting.name: seconds
        for setting in settings(context.gpu)
        if (seconds := timed(setting, data, context, steps, rounds)) is not None
    }

    # what `auto` takes, and the official code, in turns
    precision = chosen_precision(data, context) if context.gpu else "fp32"
    auto = Training(data, context.device, Setting(precision, cuda_graph="auto"), context.work / "speed")
    auto.seconds(WARM + 2 * TIMED + 10 if context.gpu else 1)
    sides: dict[str, Block] = {"auto": lambda: auto.seconds(steps)}
    if context.official is not None:
        sides |= official_sides(context, data, steps)
    else:
        report.leave_out("the official code: no --official")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, block in sides.items():
            seconds = block()
            if turn or not context.gpu:  # the first turn warms up
                times[name].append(seconds)
    for name, values in times.items():
        report.note(**{name: speed(values, 128)})
    report.note(auto_is={"precision": precision, "said": auto.said})
    if context.gpu and eager:
        median = float(np.median(times["auto"]))
        choices = [value for name, value in eager.items() if not name.startswith("fp16")]
        report.must("auto is within 5 % of the best that it chooses from", median <= NEAR * min(choices))
        report.note(**{"auto, times the time of the fastest": round(median / min(eager.values()), 3)})
    for name in sides:
        if name != "auto":
            ratio = float(np.median(np.array(times[name]) / np.array(times["auto"])))
            report.note(**{f"times the speed of {name}": round(ratio, 3)})
            if context.gpu:
                report.must(f"not slower than {name}", ratio >= 1)
    # last, as torch.compile may take what time is left
    for setting in further(context.gpu):
        if time.monotonic() + NEEDED > context.ends:
            report.leave_out(f"{setting.name}: no time was left")
        else:
            timed(setting, data, context, steps, rounds)


def timed(setting: Setting, data: Any, context: Context, steps: int, rounds: int) -> float | None:
    """Time one setting, warm, alone in memory; -> median seconds of a step, or None where it fails."""
    try:
        training = Training(data, context.device, setting, context.work / "speed")
        started = time.perf_counter()
        training.seconds(WARM + 2 if context.gpu else 1)
        warm = time.perf_counter() - started
        blocks = [training.seconds(steps) for _ in range(rounds)]
    # one that fails is told, and the others go on
    except (RuntimeError, torch.OutOfMemoryError) as error:
        context.report.note(**{setting.name: {"error": str(error).splitlines()[0]}})
        context.report.must(f"{setting.name} runs", False)
        return None
    context.report.note(**{setting.name: speed(blocks, setting.batch) | {"warm_up_s": round(warm, 2)}})
    return float(np.median(blocks))


def settings(gpu: bool) -> Iterator[Setting]:
    """What `auto` chooses from, and fp16."""
    if not gpu:
        yield Setting("fp32")
        return
    for precision in ("fp32", "bf16", "fp16"):
        for graph in ("off", "on"):
            yield Setting(precision, BATCHES[0], graph)  # type: ignore[arg-type]


def further(gpu: bool) -> Iterator[Setting]:
    """Without cuDNN's search, which short runs do without; larger batches and torch.compile, which a user has
    to ask for."""
    if not gpu:
        return
    for precision in ("fp32", "bf16"):
        yield Setting(precision, BATCHES[0], "on", searches=False)
    for batch in BATCHES[1:]:
        for graph in ("off", "on"):
            yield Setting("bf16", batch, graph)  # type: ignore[arg-type]
    for graph in ("off", "on"):
        yield Setting("bf16", BATCHES[0], graph, compile=True)  # type: ignore[arg-type]


def speed(seconds: list[float], batch: int) -> dict[str, Any]:
    low, middle, high = (float(value) for value in np.percentile(seconds, [25, 50, 75]))
    return {
        "ms": round(1e3 * middle, 3),
        "quartiles": [round(1e3 * low, 3), round(1e3 * high, 3)],
        "images_per_second": round(batch / middle, 1),
    }


def chosen_precision(data: Any, context: Context) -> str:
    """-> what --precision auto would take."""
    training = Training(data, context.device, Setting("fp32"), context.work / "speed")
    config = TrainConfig(output=OutputOptions(quiet=True))
    trainer = training.trainer
    return fastest_precision(trainer.network, trainer.method, config, training.place)


def official_sides(context: Context, data: Any, steps: int) -> dict[str, Block]:
    """The official training function on its own loader with four workers, and on batches that are there
    already."""
    from benchmarks.official import endless, official_training

    device = torch.device(context.device)
    training = official_training(context.need_official(), data, device, seed=0)
    held = [[value.to(device) for value in batch] for batch in islice(training.trainloader, 8)]

    def block(batches: Callable[[int], Iterable[Any]]) -> Block:
        def timed() -> float:
            clock = Stopwatch(device)
            training.run(clock(batches(steps + WARM), WARM), 100)
            return clock.seconds / steps

        return timed

    return {
        "official, four workers": block(lambda count: endless(training.trainloader, count)),
        "official, from memory": block(lambda count: endless(held, count)),
    }


class Stopwatch:
    """Times the batches that a function takes, after some that do not count."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, float("nan")

    def __call__(self, batches: Iterable[Any], warm: int) -> Iterator[Any]:
        started = 0.0
        for number, batch in enumerate(batches):
            if number == warm:
                wait(self.device)
                started = time.perf_counter()
            yield batch
        wait(self.device)
        self.seconds = time.perf_counter() - started
