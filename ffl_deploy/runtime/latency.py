"""How fast a session is on this machine: latency of one image, throughput at the batch that suits it best."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ffl_deploy.host import available_cores
from ffl_deploy.manifest import LatencyRecord

BATCHES = (1, 8, 32, 64)
SECONDS = 0.3  # of measurement per batch size, after the warm-up
WARM_UP_CALLS = 3


def measure_latency(
    run: Callable[[np.ndarray], Any],
    images: np.ndarray,
    batches: Sequence[int] = BATCHES,
    seconds: float = SECONDS,
    threads: int | None = None,
    gpu: str = "",
) -> LatencyRecord:
    """Time `run` on uint8 images [n, h, w, 3], cycling through them.

    Args: threads: of the processor that compute (all cores); gpu: what computes in their place.
    """
    times = {batch: call_seconds(run, images, batch, seconds) for batch in sorted({1, *batches})}
    throughput = {str(batch): round(batch / float(np.median(values)), 1) for batch, values in times.items()}
    return LatencyRecord(
        p50_ms=round(float(np.percentile(times[1], 50)) * 1e3, 4),
        p95_ms=round(float(np.percentile(times[1], 95)) * 1e3, 4),
        images_per_second=throughput,
        best_batch=int(max(throughput, key=lambda name: throughput[name])),
        threads=0 if gpu else threads or available_cores(),
        machine=gpu or machine_name(),
    )


def call_seconds(
    run: Callable[[np.ndarray], Any], images: np.ndarray, batch: int, seconds: float
) -> np.ndarray:
    """-> seconds of each call with `batch` images: at least 5 calls, for about `seconds` in all."""
    whole = np.resize(images, (max(len(images), batch), *images.shape[1:]))
    starts = list(range(0, len(whole) - batch + 1, batch))
    for call in range(WARM_UP_CALLS):
        run(whole[starts[call % len(starts)] :][:batch])
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end:
        part = whole[starts[len(taken) % len(starts)] :][:batch]
        start = time.perf_counter()
        run(part)
        taken.append(time.perf_counter() - start)
    return np.array(taken)


def machine_name() -> str:
    """-> the processor's model and the instructions that decide int8 and bf16 speed, as Linux tells them."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = [line.partition(":") for line in info.read_text().splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = set(fields.get("flags", "").split())
    known = [
        flag
        for flag in ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")
        if flag in flags
    ]
    return f"{fields.get('model name', platform.machine())} ({', '.join(known) or 'no AVX'})"
