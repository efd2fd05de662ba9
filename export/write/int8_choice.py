"""Which method an int8 file is calibrated by, and which layers stay in float.

The choice is made on the validation split, among the methods whose file holds its gate on the images that it
will be verified on (the logits alone: no label is looked at).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.write.ranges import METHODS
from ffl_deploy.host import available_cores
from ffl_deploy.manifest import Candidate
from ffl_deploy.parity import PARITY_GATES, ParityMetrics, compare, judge
from ffl_deploy.runtime import OnnxRuntimeSession, Session
from ffl_deploy.runtime.replay import batch_of, run_in_batches
from ffl_deploy.runtime.session import FixedBatchSession

RISK = 0.5
"""Share of the KL gate from which on accuracy is at risk, so that keeping layers in float is tried."""
BLOCKS = 48
"""Sensitivity is measured of so many parts of a network at most:
neighbouring layers of a deeper one count as one."""
SENSITIVITY_IMAGES = 128


@dataclass(frozen=True)
class Held:
    """Images uint8 [n, h, w, 3] that a quantised file is compared on,
    and PyTorch's logits float32 [n, classes]."""

    images: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Judges:
    """What the files that are tried are compared on.

    held: validation images, which choose the method; verified: the sets of images that the chosen file has to
    hold its gate on, in export and in ffl-verify; batch: the only size that a file takes, None for any.
    """

    held: Held
    verified: tuple[Held, ...]
    batch: int | None = None

    def candidate(self, path: Path, method: str, float_layers: Sequence[str]) -> Candidate:
        """-> how the file, which was written by `method` with `float_layers` in float, does."""
        metrics = self._compared(path, self.held)
        gate = PARITY_GATES["int8"]
        holds = not any(judge({"64": self._compared(path, one)}, gate).failed for one in self.verified)
        return Candidate(
            method=method,
            float_layers=list(float_layers),
            mean_kl=metrics.mean_kl,
            top1_agreement=metrics.top1_agreement,
            golden=holds,
        )

    def divergence(self, path: Path) -> float:
        """-> mean KL of the file, on some of the images."""
        few = slice(SENSITIVITY_IMAGES)
        return self._compared(path, Held(self.held.images[few], self.held.logits[few])).mean_kl

    def _compared(self, path: Path, held: Held) -> ParityMetrics:
        session: Session = OnnxRuntimeSession(path, "int8", threads=1)
        if self.batch:
            session = FixedBatchSession(session, self.batch)
        count, cores = len(held.images), available_cores()
        batch = batch_of(64, cores, *held.images.shape[1:3])
        outputs = run_in_batches(session.run, held.images.__getitem__, count, batch, callers=cores)
        return compare(held.logits, outputs.logits)


def choose(
    measure: Callable[[str, Sequence[str]], Candidate],
    ranked: Callable[[str], list[list[str]]],
    methods: Sequence[str] = METHODS,
) -> tuple[Candidate, list[Candidate]]:
    """-> (the best candidate, all that were measured), by mean KL on the validation split,
    of those that can be verified.

    First the method. Where the best is at risk, blocks of layers stay in float, the most sensitive first,
    twice as many each time, at most half of them: float layers cost speed. Last, the other methods with the
    same layers. ranked: method -> blocks of layers by falling sensitivity; asked only then.
    """
    candidates = [measure(method, ()) for method in methods]
    best = min(candidates, key=lambda candidate: candidate.rank)
    if not at_risk(best):
        return best, candidates
    order, count = ranked(best.method), 1
    while at_risk(best) and count <= max(1, len(order) // 2):
        layers = [name for block in order[:count] for name in block]
        candidates.append(measure(best.method, layers))
        best = min(best, candidates[-1], key=lambda candidate: candidate.rank)
        count *= 2
    for other in sorted(candidates[: len(methods)], key=lambda candidate: candidate.rank):
        if best.golden:
            break
        if other.method != best.method:
            candidates.append(measure(other.method, candidates[-1].float_layers))
            best = min(best, candidates[-1], key=lambda candidate: candidate.rank)
    return best, candidates


def sensitive_blocks(parts: list[list[str]], divergence: Callable[[list[str]], float]) -> list[list[str]]:
    """-> `parts` by falling damage: that of quantising one of them while all the others stay in float.

    divergence: layers that stay in float -> mean KL.
    """
    size = -(-len(parts) // BLOCKS)
    joined = [
        [name for part in parts[start : start + size] for name in part]
        for start in range(0, len(parts), size)
    ]
    damage = [
        divergence([name for other in joined if other is not block for name in other]) for block in joined
    ]
    return [joined[index] for index in np.argsort([-value for value in damage], kind="stable")]


def at_risk(candidate: Candidate) -> bool:
    gate = PARITY_GATES["int8"]
    low = candidate.mean_kl > RISK * gate.mean_kl or candidate.top1_agreement < gate.top1_agreement
    return low or not candidate.golden
