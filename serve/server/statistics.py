"""What a model has done so far, as Triton's statistics extension counts it; `perf_analyzer` reads these.

Source: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Duration:
    """How often something happened, and the nanoseconds that it took together."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.ns += round(seconds * 1e9)

    def described(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass
class ModelStatistics:
    """The counters of one model. `input`: reading and decoding; `output`: writing the answer."""

    images: int = 0
    last_inference_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    input: Duration = field(default_factory=Duration)
    runs: Duration = field(default_factory=Duration)
    output: Duration = field(default_factory=Duration)
    by_batch: dict[int, Duration] = field(default_factory=lambda: defaultdict(Duration))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ran(self, images: int, seconds: float) -> None:
        """A batch of `images` has run; called from its batcher's threads."""
        with self._lock:
            self.images += images
            self.runs.add(seconds)
            self.by_batch[images].add(seconds)
            self.last_inference_ms = time.time_ns() // 1_000_000

    def waited(self, seconds: float) -> None:
        """A request has left the queue after `seconds`; called from its batcher's threads."""
        with self._lock:
            self.queue.add(seconds)

    def described(self, name: str, version: str) -> dict[str, Any]:
        """-> an element of `model_stats`."""
        with self._lock:
            return {
                "name": name,
                "version": version,
                "last_inference": self.last_inference_ms,
                "inference_count": self.images,
                "execution_count": self.runs.count,
                "inference_stats": {
                    "success": self.success.described(),
                    "fail": self.fail.described(),
                    "queue": self.queue.described(),
                    "compute_input": self.input.described(),
                    "compute_infer": self.runs.described(),
                    "compute_output": self.output.described(),
                },
                "batch_stats": [
                    {"batch_size": images, "compute_infer": taken.described()}
                    for images, taken in sorted(self.by_batch.items())
                ],
            }
