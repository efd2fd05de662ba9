"""Do two sets of logits say the same? Metrics, gates and verdicts as three separate, serialisable things.

A metric is what was measured, a gate what is allowed, a verdict what follows: a stored metric can be judged
again by another gate. Export compares the saved file with training's own evaluation through these,
`ffl-verify` an installation with the golden samples.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np

from ffl_deploy.errors import CheckError
from ffl_deploy.statistics import PairedDifference, log_softmax

TIE = 1e-4
"""Two logits closer than this share of the logits' standard deviation are a tie:
rounding may order them either way."""
UNDIRECTED = 0.5
"""Share of the logits' typical norm (root mean square over the images) below which an image's logits point
nowhere: all classes are about equally likely, and the smallest rounding turns them. Their cosine is not
looked at, everything else is."""
MIN_ACCURACY_IMAGES = 5000
"""Below this number of images no interval is narrow enough to show that accuracy held to half a point."""


class ParityMetrics(msgspec.Struct, frozen=True):
    """How far a candidate's logits are from the reference's.
    Rows with NaN or Inf count as `non_finite` and nowhere else."""

    n: int
    non_finite: int
    logit_std: float  # of the reference; the unit of scaled_max_diff
    max_abs_diff: float
    scaled_max_diff: float
    cosine_min: float  # of the images whose logits have a direction (UNDIRECTED)
    mean_kl: float  # KL(reference || candidate) of the softmax outputs, in nats
    top1_mismatches: int  # outside ties
    top1_ties: int
    top5_mismatches: int  # sets of the five largest, outside ties
    top5_ties: int
    probability_error: float | None = None  # max |probabilities - softmax(candidate logits / temperature)|

    @property
    def top1_agreement(self) -> float:
        return 1 - self.top1_mismatches / max(self.n, 1)


def differ_most(reference: np.ndarray, candidate: np.ndarray, count: int = 1) -> np.ndarray:
    """logits [n, classes] -> int64 [count]: the rows that differ most; those that are not finite first."""
    with np.errstate(invalid="ignore"):
        off = np.abs(candidate - reference).max(axis=1)
    return np.argsort(-np.nan_to_num(off, nan=np.inf, posinf=np.inf), kind="stable")[:count]


class ParityGate(msgspec.Struct, frozen=True):
    """What is allowed at one precision; None is reported without being judged."""

    precision: str
    scaled_max_diff: float | None
    cosine_min: float
    mean_kl: float
    top1_agreement: float
    top5_agreement: float | None = None
    probability_error: float = 1e-5

    def allowed_mismatches(self, n: int) -> int:
        """An agreement below 1 always allows one image:
        a share of few images cannot be resolved more finely."""
        return 0 if self.top1_agreement == 1 else max(1, math.ceil(round((1 - self.top1_agreement) * n, 6)))


class Finding(msgspec.Struct, frozen=True):
    """A metric that broke its gate. `where` is the batch size, or another circumstance."""

    metric: str
    measured: float
    limit: float
    where: str = ""

    def __str__(self) -> str:
        where = f" at {self.where}" if self.where else ""
        # as many digits as it takes to be another number than the gate
        digits = next((d for d in range(3, 17) if float(f"{self.measured:.{d}g}") != self.limit), 17)
        return f"{self.metric} is {self.measured:.{digits}g}{where}, the gate is {self.limit:.6g}"


class Verdict(msgspec.Struct, frozen=True):
    status: Literal["passed", "failed", "inconclusive"]
    findings: list[Finding] = []
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.status == "failed"

    @property
    def summary(self) -> str:
        """-> the note where there is one, else the status."""
        return self.note or self.status


class ParityRecord(msgspec.Struct, frozen=True):
    """What a manifest keeps of one comparison: metrics for each batch size, the gate, the verdict."""

    gate: ParityGate
    batches: dict[str, ParityMetrics]
    verdict: Verdict

    @property
    def worst(self) -> ParityMetrics:
        """-> the metrics of the batch size with the largest logit difference."""
        return max(self.batches.values(), key=lambda metrics: (metrics.non_finite, metrics.scaled_max_diff))


class AccuracyGate(msgspec.Struct, frozen=True):
    """`max_drop` bounds the measured loss of accuracy, `min_lower_bound` the paired interval's lower end;
    shares of 1."""

    precision: str
    max_drop: float | None = None
    min_lower_bound: float | None = None


# docs/export.md has the measurements behind them.
PARITY_GATES = {
    gate.precision: gate
    for gate in (
        ParityGate("fp32", 1e-4, 0.99999, 1e-6, 1.0, top5_agreement=1.0),
        ParityGate("fp16", 2e-2, 0.9999, 1e-4, 0.999, probability_error=2e-3),
        ParityGate("bf16", 1.5e-1, 0.999, 1e-3, 0.995, probability_error=1e-2),
        ParityGate("int8", None, 0.95, 1e-2, 0.95),
    )
}
ACCURACY_GATES = {
    gate.precision: gate
    for gate in (
        AccuracyGate("fp32", max_drop=0.0),
        AccuracyGate("fp16", max_drop=0.001),
        AccuracyGate("bf16", max_drop=0.003),
        AccuracyGate("int8", min_lower_bound=-0.005),
    )
}
PRECISIONS = tuple(PARITY_GATES)


def gate_precision(stored: str, computed: str) -> str:
    """-> whose gate applies: the coarser of what the file stores and what the processor computes in."""
    return max(stored, computed, key=lambda name: PRECISIONS.index(name) if name in PRECISIONS else -1)


def compare(
    reference: np.ndarray,
    candidate: np.ndarray,
    probabilities: np.ndarray | None = None,
    temperature: float = 1.0,
) -> ParityMetrics:
    """-> metrics of candidate logits [n, classes] against reference logits [n, classes].

    Args: probabilities: the candidate's own [n, classes], checked against softmax(candidate / temperature).
    Raises CheckError where the shapes differ or the reference itself is not finite.
    """
    if reference.shape != candidate.shape:
        raise CheckError(f"the logits have shape {candidate.shape}, the reference has {reference.shape}.")
    if not np.isfinite(reference).all():
        raise CheckError(
            "the reference logits hold NaN or infinity; train or load a checkpoint that did not diverge."
        )

    # rows that are no numbers are counted, the others compared
    finite = np.isfinite(candidate).all(axis=1)
    if probabilities is not None:
        finite &= np.isfinite(probabilities).all(axis=1)
    non_finite = int((~finite).sum())
    r, c = reference[finite].astype(np.float64), candidate[finite].astype(np.float64)

    # logits: largest difference, direction, distribution, order
    std = float(reference.std(dtype=np.float64)) or 1.0
    max_abs = float(np.abs(r - c).max(initial=0.0))
    cosine = _cosines(r, c)
    log_r, log_c = log_softmax(r), log_softmax(c)
    kl = (np.exp(log_r) * (log_r - log_c)).sum(axis=1)
    top1_mismatches, top1_ties = _disagreements(r, c, 1, TIE * std)
    top5_mismatches, top5_ties = _disagreements(r, c, 5, TIE * std)

    # probabilities: what the candidate's own logits give
    error = None
    if probabilities is not None:
        expected = np.exp(log_softmax(c / temperature))
        error = float(np.abs(probabilities[finite] - expected).max(initial=0.0))

    return ParityMetrics(
        n=len(reference),
        non_finite=non_finite,
        logit_std=std,
        max_abs_diff=max_abs,
        scaled_max_diff=max_abs / std,
        cosine_min=float(cosine.min(initial=1.0)),
        mean_kl=max(0.0, float(kl.mean())) if len(r) else 0.0,
        top1_mismatches=top1_mismatches,
        top1_ties=top1_ties,
        top5_mismatches=top5_mismatches,
        top5_ties=top5_ties,
        probability_error=error,
    )


def _cosines(r: np.ndarray, c: np.ndarray) -> np.ndarray:
    """-> the cosine of each pair of rows whose logits, on either side, have a direction:
    a norm of at least UNDIRECTED."""
    lengths_r, lengths_c = np.linalg.norm(r, axis=1), np.linalg.norm(c, axis=1)
    typical = np.linalg.norm(r) / max(len(r), 1) ** 0.5  # root mean square
    directed = np.maximum(lengths_r, lengths_c) >= UNDIRECTED * typical
    products = lengths_r * lengths_c
    found: np.ndarray = np.divide((r * c).sum(axis=1), products, out=np.zeros(len(r)), where=products > 0)
    return found[directed & (lengths_r + lengths_c > 0)]


def _disagreements(reference: np.ndarray, candidate: np.ndarray, k: int, tie: float) -> tuple[int, int]:
    """-> (rows whose sets of the k largest differ,
    rows left out because the k-th and next are closer than `tie`)."""
    if not len(reference) or reference.shape[1] <= k:
        return 0, 0
    falling = -np.sort(-reference, axis=1)
    tied = falling[:, k - 1] - falling[:, k] <= tie
    sets = [
        np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :k], axis=1)
        for logits in (reference, candidate)
    ]
    different = (sets[0] != sets[1]).any(axis=1)
    return int((different & ~tied).sum()), int(tied.sum())


def judge(batches: dict[str, ParityMetrics], gate: ParityGate) -> Verdict:
    """-> passed, or failed with every broken metric; NaN and Inf come first and alone,
    since nothing else means much then."""
    broken = [
        Finding("number of images with NaN or infinite logits", metrics.non_finite, 0, f"batch {batch}")
        for batch, metrics in batches.items()
        if metrics.non_finite
    ]
    if broken:
        return Verdict("failed", broken)
    most = max(metrics.n for metrics in batches.values())
    for batch, metrics in batches.items():
        where = f"batch {batch}"
        # A share is judged on all images; at the small batches, which see some of them, chance would decide.
        whole = metrics.n == most or gate.top1_agreement == 1
        allowed = gate.allowed_mismatches(metrics.n) if whole else None
        checks = [
            ("max logit difference / standard deviation", metrics.scaled_max_diff, gate.scaled_max_diff, 1),
            ("smallest cosine similarity", metrics.cosine_min, gate.cosine_min, -1),
            ("mean KL divergence", metrics.mean_kl, gate.mean_kl, 1),
            ("number of top-1 disagreements", metrics.top1_mismatches, allowed, 1),
            (
                "number of top-5 disagreements",
                metrics.top5_mismatches,
                0 if gate.top5_agreement == 1 else None,
                1,
            ),
            ("error of the probabilities", metrics.probability_error, gate.probability_error, 1),
        ]
        broken += [
            Finding(name, measured, limit, where)
            for name, measured, limit, sign in checks
            if measured is not None and limit is not None and sign * measured > sign * limit
        ]
    return Verdict("failed" if broken else "passed", broken)


def judge_accuracy(difference: PairedDifference, gate: AccuracyGate, ties: int = 0) -> Verdict:
    """-> whether accuracy held. Few images are `inconclusive`,
    unless McNemar's one-sided p already shows a loss.

    Args: ties: changed images whose order of classes is a matter of rounding;
    a zero drop is judged without them.
    """
    if gate.max_drop == 0.0:  # decided by identity, not by statistics: any number of images will do
        changed = difference.gained + difference.lost
        broken = (
            [Finding("number of images whose correctness changed", changed, ties)] if changed > ties else []
        )
        return Verdict("failed" if broken else "passed", broken)
    if difference.n < MIN_ACCURACY_IMAGES:
        if difference.p_worse < 0.05:
            broken = [
                Finding("one-sided McNemar p of a loss", difference.p_worse, 0.05, f"n = {difference.n}")
            ]
            return Verdict("failed", broken)
        return Verdict("inconclusive", note=f"inconclusive (n = {difference.n})")
    broken = []
    if gate.max_drop is not None and -difference.delta > gate.max_drop:
        broken.append(Finding("drop of accuracy", -difference.delta, gate.max_drop))
    if gate.min_lower_bound is not None and difference.interval.low <= gate.min_lower_bound:
        broken.append(
            Finding("lower bound of the accuracy difference", difference.interval.low, gate.min_lower_bound)
        )
    return Verdict("failed" if broken else "passed", broken)
