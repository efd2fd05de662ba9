"""Accuracies, their differences and what a sample of this size can say about them.
NumPy and the standard library alone."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from statistics import NormalDist

import msgspec
import numpy as np


class Interval(msgspec.Struct, frozen=True):
    """A two-sided confidence interval; shares of 1, not points."""

    low: float
    high: float


class PairedDifference(msgspec.Struct, frozen=True):
    """Two classifiers on the same `n` images. `gained`: only the candidate is right; `lost`:
    only the reference is.

    `delta` = (gained - lost) / n with its 95 % Tango interval; `p_worse` and `p_different` are exact McNemar
    probabilities, one-sided (candidate worse) and two-sided.
    """

    n: int
    reference_accuracy: float
    candidate_accuracy: float
    gained: int
    lost: int
    delta: float
    interval: Interval
    p_worse: float
    p_different: float


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """-> Wilson's score interval (1927) of a share `successes / n`. Raises ValueError for n < 1."""
    if n < 1:
        raise ValueError("a share of no trials has no interval")
    z = _z(confidence)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Interval(max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def tango_interval(gained: int, lost: int, n: int, confidence: float = 0.95) -> Interval:
    """-> score interval of the paired difference (gained - lost) / n (Tango, Statistics in
    Medicine 17, 1998).

    Unlike the Wald interval it does not collapse to a point where no pair is discordant.
    Raises ValueError for n < 1 or more discordant pairs than pairs.
    """
    if n < 1 or gained + lost > n:
        raise ValueError(f"{gained} + {lost} discordant pairs out of {n} are not a sample")
    z = _z(confidence)

    def score(delta: float) -> float:
        # Maximum-likelihood estimate of the probability
        # of a "lost" pair when the difference is held at delta.
        b = -gained - lost + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        lost_share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * lost_share + delta * (1 - delta))
        distance = gained - lost - n * delta
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    estimate = (gained - lost) / n

    def solve(outside: float, target: float) -> float:
        # The score falls from +inf at -1 to -inf at 1;
        # bisection needs no derivative and cannot leave [-1, 1].
        low, high = min(outside, estimate), max(outside, estimate)
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return (low + high) / 2

    return Interval(solve(-1.0, z) if estimate > -1 else -1.0, solve(1.0, -z) if estimate < 1 else 1.0)


def mcnemar_p(gained: int, lost: int) -> tuple[float, float]:
    """-> (p_worse, p_different): exact McNemar, i.e. binomial(gained + lost, 1/2) tails,
    one- and two-sided."""
    trials = gained + lost
    p_worse = _binomial_upper_tail(lost, trials)
    return p_worse, min(1.0, 2 * min(p_worse, _binomial_upper_tail(gained, trials)))


def paired_difference(reference_right: np.ndarray, candidate_right: np.ndarray) -> PairedDifference:
    """Compare two classifiers image by image.

    Args: boolean arrays [n], whether each image was classified correctly.
    Raises ValueError for unequal or empty arrays.
    """
    if reference_right.shape != candidate_right.shape or not reference_right.size:
        raise ValueError("a paired comparison needs the same, non-empty set of images on both sides")
    n = int(reference_right.size)
    gained = int(np.sum(candidate_right & ~reference_right))
    lost = int(np.sum(reference_right & ~candidate_right))
    p_worse, p_different = mcnemar_p(gained, lost)
    return PairedDifference(
        n=n,
        reference_accuracy=float(reference_right.mean()),
        candidate_accuracy=float(candidate_right.mean()),
        gained=gained,
        lost=lost,
        delta=(gained - lost) / n,
        interval=tango_interval(gained, lost, n),
        p_worse=p_worse,
        p_different=p_different,
    )


def packed(right: np.ndarray) -> str:
    """bool [n] -> base64 of its bits, the first image's first: 10,000 images take 1.7 kB."""
    return base64.b64encode(np.packbits(right.astype(bool)).tobytes()).decode()


def unpacked(text: str, n: int) -> np.ndarray:
    """The inverse of `packed`. Raises ValueError where the text is not of `n` images."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))
    if len(bits) != -(-n // 8) * 8:
        raise ValueError(f"{len(bits)} bits are not those of {n} images")
    return bits[:n].astype(bool)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """-> interval of the median by order statistics, whatever the distribution: as far inwards as the
    binomial probability of both ends allows; the whole range where there are too few values (fewer than 6).

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values have no median")
    n, in_order = len(values), sorted(values)
    outside, k = 0.0, 0
    while k < n // 2:  # dropping k from each end leaves out 2 P(X < k) of X ~ binomial(n, 1/2)
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 1 - confidence:
            break
        k += 1
    k = max(k - 1, 0)
    return Interval(in_order[k], in_order[n - 1 - k])


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """-> ECE with equal-width bins of the top-1 confidence (Guo et al. 2017, eq. 3).

    Args: probabilities float [n, classes]; labels int [n].
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    # Bin k holds (k/bins, (k+1)/bins], so a confidence of exactly 1 falls into the last one.
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(index, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """-> log-softmax over the last axis in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """-> the temperature T > 0 that minimises the mean negative log-likelihood of softmax(logits / T)
    (Guo et al. 2017).

    None where every image is classified correctly: the likelihood then grows without end as T falls. It is
    convex in 1 / T, so a golden-section search over log T in [1/20, 20] finds its minimum.
    Args: logits float [n, classes] of images the network was not trained on; labels int [n].
    """
    if (logits.argmax(axis=1) == labels).all():
        return None

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / math.exp(log_temperature))
        return -float(scaled[np.arange(len(labels)), labels].mean())

    ratio = (math.sqrt(5) - 1) / 2
    low, high = -math.log(20), math.log(20)
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    loss_left, loss_right = loss(left), loss(right)
    while high - low > 1e-5:
        if loss_left < loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - ratio * (high - low)
            loss_left = loss(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + ratio * (high - low)
            loss_right = loss(right)
    return math.exp((low + high) / 2)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _binomial_upper_tail(successes: int, trials: int) -> float:
    """-> P(X >= successes) for X ~ binomial(trials, 1/2), exact: integers until the last division."""
    term, total = 1, 0  # C(trials, 0)
    for k in range(trials + 1):
        if k >= successes:
            total += term
        term = term * (trials - k) // (k + 1)
    return total / 2**trials
