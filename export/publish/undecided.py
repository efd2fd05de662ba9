"""Which of two artefacts is the more accurate, and whether the test images can tell."""

from __future__ import annotations

import numpy as np

from ffl_deploy.manifest import AccuracyRecord
from ffl_deploy.statistics import Interval, paired_difference, unpacked


def behind(best: AccuracyRecord | None, other: AccuracyRecord | None) -> Interval | None:
    """-> the 95 % interval of `best`'s accuracy minus `other`'s, as shares of 1, paired image by image
    (Tango): what both get right, or both wrong, says nothing about their difference.

    None where the manifests do not say which images were right, as those from before they did: the two
    accuracies alone, as if of independent images, would leave undecided what the pairs decide.
    """
    reference, candidate = _right(other), _right(best)
    if reference is None or candidate is None or len(reference) != len(candidate):
        return None
    return paired_difference(reference, candidate).interval


def _right(record: AccuracyRecord | None) -> np.ndarray | None:
    return None if record is None or not record.right else unpacked(record.right, record.n)
