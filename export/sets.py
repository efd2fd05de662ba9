"""Calibrates what `--sets` promises, on held-out images, for one variant's own probabilities.

Sets: split conformal prediction with the score 1 - probability of the true class (LAC: Sadinle, Lei and
Wasserman 2019), with one threshold for all classes, and with one for each cluster of classes whose scores
are alike (Ding et al. 2023). Abstention: selective classification with a guaranteed risk (Geifman and
El-Yaniv 2017), tested from the surest images on (fixed-sequence testing: Angelopoulos et al. 2021).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ffl_deploy.data.datasets import Split
from ffl_deploy.sets import CalibratedSets, MeasuredSets, SetLevel, set_answers

SHARES = (0.90, 0.95, 0.99)
BY_CLASS = "-by-class"
"""Behind the name of a level whose thresholds are those of clusters of classes."""
DELTA = 0.1
EMBEDDED = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Quantiles of a class's scores that it is clustered by, besides the share that is promised."""
ROUNDS = 100  # of k-means, which ends as soon as nothing moves


class CalibrationImages(NamedTuple):
    """What the promises are calibrated on. note: what else these images were used for."""

    split: Split
    name: str
    note: str = ""


class Answered(NamedTuple):
    """A variant's probabilities [n, classes] of labelled images (int64 [n])."""

    probabilities: np.ndarray
    labels: np.ndarray

    @property
    def of_truth(self) -> np.ndarray:
        """-> [n]: the probability of the true class; the smaller, the stranger is the image."""
        return self.probabilities[np.arange(len(self.labels)), self.labels].astype(np.float64)


def calibrate_sets(held: Answered, test: Answered, images: CalibrationImages, split: str) -> CalibratedSets:
    """-> the promises of a variant that gave `held` of the calibration images, and what they come to on
    `test`, whose split's name is `split`."""
    levels = []
    for share in SHARES:
        name, above = f"{100 * share:.0f}", answers_above(held, share)
        forms = {name: [threshold(held.of_truth, share)]}
        by_class = clustered_thresholds(held, share)
        if len(set(by_class)) > 1:  # else there are too few images to tell classes apart
            forms[name + BY_CLASS] = by_class
        for form, thresholds in forms.items():
            found = measured(thresholds, above, test, split)
            levels.append(SetLevel(form, share, thresholds, above, found))
    return CalibratedSets(images.name, len(held.labels), images.note, DELTA, levels)


def threshold(of_truth: np.ndarray, share: float) -> float:
    """-> the least probability of a class in the set, so that at least `share` of new images have theirs in
    it: the ceil((n + 1) share)-th largest of the true classes' [n]; 0, every class, where n are too few to
    say."""
    rank = math.ceil(round((len(of_truth) + 1) * share, 9))
    return float(np.sort(of_truth)[-rank]) if rank <= len(of_truth) else 0.0


def clustered_thresholds(held: Answered, share: float, seed: int = 0) -> list[float]:
    """-> a threshold for each class, that of its cluster (Ding et al. 2023, with the sizes of its appendix).

    One part of the images finds clusters of classes whose scores are distributed alike, the other the
    threshold of each; classes with too few images to be told apart share the threshold of all.
    """
    classes, generator = held.probabilities.shape[1], np.random.default_rng(seed)
    of_truth, labels = held.of_truth, held.labels
    counts = np.bincount(labels, minlength=classes)

    # how many images find the clusters, and how many clusters there are
    rare = 1 / min(share, 1 - share) - 1  # images below which a class's own quantile says nothing
    least = max(int(counts.min()), math.ceil(rare))
    spent = classes / (75 + classes)
    clusters = int(spent * least / 2)
    clustering = generator.random(len(labels)) < spent
    found = np.bincount(labels[clustering], minlength=classes)
    common = found >= rare
    everything = threshold(of_truth, share)
    if clusters < 2 or common.sum() <= clusters:
        return [everything] * classes

    # classes by the quantiles of their scores
    quantiles = [*EMBEDDED, share]
    embedded = np.stack(
        [np.quantile(1 - of_truth[clustering & (labels == c)], quantiles) for c in np.flatnonzero(common)]
    )
    cluster = np.full(classes, -1)
    cluster[common] = k_means(embedded, np.sqrt(found[common]), clusters, generator)

    # each cluster's threshold, from the images that did not find it
    thresholds = np.full(classes, threshold(of_truth[~clustering], share))
    of_image = cluster[labels]
    for number in range(clusters):
        thresholds[cluster == number] = threshold(of_truth[~clustering & (of_image == number)], share)
    return [float(value) for value in thresholds]


def k_means(
    points: np.ndarray, weights: np.ndarray, clusters: int, generator: np.random.Generator
) -> np.ndarray:
    """points [n, d], weights [n] -> int64 [n]: the cluster of each (Lloyd's algorithm, k-means++ seeds)."""
    chosen = [int(generator.choice(len(points), p=weights / weights.sum()))]
    for _ in range(clusters - 1):
        nearest = ((points[:, None] - points[chosen]) ** 2).sum(axis=2).min(axis=1) * weights
        if not nearest.any():  # fewer different points than clusters
            break
        chosen.append(int(generator.choice(len(points), p=nearest / nearest.sum())))
    centres, before = points[chosen], np.full(len(points), -1)
    for _ in range(ROUNDS):
        nearest = ((points[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
        if np.array_equal(nearest, before):
            break
        before = nearest
        for number in np.unique(nearest):
            rows = nearest == number
            centres[number] = np.average(points[rows], axis=0, weights=weights[rows])
    return before


def answers_above(held: Answered, share: float, delta: float = DELTA) -> float | None:
    """-> the confidence above which at least `share` of the answers are right, in all but `delta` of the
    calibration samples; None where no threshold can be shown to do so.

    Tested from the surest tenth of the images on, by the exact binomial tail, until a test fails. That holds
    where surer answers are no worse ones.
    """
    confidence = held.probabilities.max(axis=1).astype(np.float64)
    order = np.argsort(-confidence, kind="stable")
    wrong = np.cumsum((held.probabilities.argmax(axis=1) != held.labels)[order])
    n = len(order)
    enough = math.ceil(1.5 * math.log(delta) / math.log(share))  # without an error two thirds would do
    best = None
    # the image at `last` bounds those before it: only they are above its confidence
    for last in range(max(enough, n // 10), n, max(1, n // 100)):
        if binomial_tail(int(wrong[last - 1]), last, 1 - share) > delta:
            break
        best = float(confidence[order[last]])
    return best


def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """-> P(X <= successes), X of the binomial distribution; exact to rounding."""
    log_p, log_q = math.log(probability), math.log1p(-probability)
    terms = [
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * log_p
        + (trials - k) * log_q
        for k in range(successes + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, terms)))


def measured(thresholds: list[float], above: float | None, test: Answered, split: str) -> MeasuredSets:
    """-> what thresholds come to on images that they were not calibrated on."""
    member, abstain = set_answers(test.probabilities, thresholds, above)
    n = len(test.labels)
    covered = member[np.arange(n), test.labels]
    of_class = np.bincount(test.labels, covered)[np.unique(test.labels)]
    right = (test.probabilities.argmax(axis=1) == test.labels)[~abstain]
    return MeasuredSets(
        split=split,
        images=n,
        coverage=float(covered.mean()),
        mean_size=float(member.sum(axis=1).mean()),
        worst_class=float((of_class / np.unique(test.labels, return_counts=True)[1]).min()),
        answered=float((~abstain).mean()),
        answered_right=float(right.mean()) if len(right) else None,
    )
