"""Does a step wait for the GPU, and what does it launch?"""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_acceptance.images import decoded
from benchmarks.gpu_acceptance.report import Context
from benchmarks.gpu_acceptance.training import Setting, Training
from train.cuda_graph import WARM
from train.loop import AGREE_EVERY

STEPS = 40


def run(context: Context) -> None:
    context.need_gpu()
    data = decoded(context.data, 60)
    for graph in ("off", "on"):
        for precision in ("fp32", "bf16"):
            setting = Setting(precision, cuda_graph=graph, searches=False)  # type: ignore[arg-type]
            training = Training(data, context.device, setting, context.work / "waits")
            for _ in range(AGREE_EVERY * (WARM + 1)):
                training.step()
            waits = waited(training)
            context.report.must(f"{setting.name}: no step waits", not waits)
            context.report.note(**{f"{setting.name}: waits": waits})
            found = profiled(training, context.out / f"trace-{graph}-{precision}.json")
            context.report.note(**{setting.name: found})


def waited(training: Training) -> list[str]:
    """-> the errors of steps in which a wait is one; every tenth step may wait, for its numbers."""
    waits = []
    for _ in range(STEPS):
        last = (training.number + 1) % AGREE_EVERY == 0
        torch.cuda.set_sync_debug_mode("default" if last else "error")
        try:
            training.step()
        except RuntimeError as error:
            waits.append(str(error).splitlines()[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return waits


def profiled(training: Training, trace: Path, steps: int = 5) -> dict[str, Any]:
    """-> launches, copies and the GPU's busy share of a step; the trace is left beside."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            training.step()
        torch.cuda.synchronize()
    recorded.export_chrome_trace(str(trace))
    with gzip.open(f"{trace}.gz", "wb") as file:
        file.write(trace.read_bytes())
    trace.unlink()
    events = list(recorded.events())
    calls = Counter(event.name for event in events)
    on_gpu = [event.time_range for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    span = max(r.end for r in on_gpu) - min(r.start for r in on_gpu) if on_gpu else 0
    launches = sum(
        count for name, count in calls.items() if name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
    )
    return {
        "launches": launches / steps,
        "graph launches": calls["cudaGraphLaunch"] / steps,
        "copies": sum(count for name, count in calls.items() if name.startswith("cudaMemcpy")) / steps,
        "kernels": len(on_gpu) / steps,
        "busy share": round(covered([(r.start, r.end) for r in on_gpu]) / span, 3) if span else None,
    }


def covered(ranges: list[tuple[float, float]]) -> float:
    """-> length of the union of `ranges`."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
