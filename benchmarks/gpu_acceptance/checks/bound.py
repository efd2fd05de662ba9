"""How near a step is to what this GPU could do: its kernels alone, its launches alone, its network alone."""

from __future__ import annotations

import time
from statistics import median

import torch

from benchmarks.gpu_acceptance.images import decoded
from benchmarks.gpu_acceptance.report import Context
from benchmarks.gpu_acceptance.training import Setting, Training, wait
from train.cuda_graph import WARM, Cuda
from train.machine import Place
from train.precision import seconds_of_passes, some_batch

REPLAYS = 200
TARGET = 0.6


def run(context: Context) -> None:
    context.need_gpu()
    data = decoded(context.data, 60)
    for precision in ("fp32", "bf16"):
        captured = Training(data, context.device, Setting(precision, cuda_graph="on"), context.work / "bound")
        captured.seconds(WARM + 2)
        kernels = replays(captured)
        step = median(captured.seconds(20) for _ in range(5))
        tiny = Training(
            data, context.device, Setting(precision, batch=2, searches=False), context.work / "bound"
        )
        tiny.seconds(WARM + 2)
        trainer, device = captured.trainer, captured.place.device
        batch = some_batch(trainer.network, 128, device)
        passes = seconds_of_passes(
            trainer.network,
            trainer.method,
            batch,
            Place(device, precision, searches=True),
            Cuda(device),
            graphs=True,
        )
        found = {
            "step ms": 1e3 * step,
            "kernels alone ms": 1e3 * kernels,
            "launches alone ms": 1e3 * median(tiny.seconds(20) for _ in range(3)),
            "forward and backward alone ms": 1e3 * passes,
            "share of the bound": kernels / step,
            f"target {TARGET}": kernels / step >= TARGET,
        }
        context.report.note(
            **{
                precision: {
                    name: value if value is True or value is False else round(value, 3)
                    for name, value in found.items()
                }
            }
        )


def replays(training: Training) -> float:
    """-> seconds of one replay of the captured step, from its own batches: nothing but its kernels."""
    graphed = training.trainer.take_step
    captured = max(graphed.captured.items(), key=lambda item: item[0][0][0][0])[1]  # type: ignore[union-attr]
    captured.step.replay()
    wait(training.place.device)
    started = time.perf_counter()
    for _ in range(REPLAYS):
        captured.step.replay()
    wait(training.place.device)
    torch.cuda.current_stream().synchronize()
    return (time.perf_counter() - started) / REPLAYS
