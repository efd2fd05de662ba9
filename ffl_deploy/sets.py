"""Answers with a promise: the set of classes that holds the right one, and whether to answer at all.

The thresholds are a variant's own, found by `ffl-export --sets` on held-out images and kept in the manifest;
here they are applied. docs/decisions.md says what they promise and what they do not. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from ffl_deploy.errors import UsageError, choices_sentence


class MeasuredSets(msgspec.Struct, frozen=True):
    """What the sets of one level, and answering only where `abstain` is false, came to on held-out images
    that chose nothing; shares of 1. answered_right is None where nothing was answered."""

    split: str
    images: int
    coverage: float  # of the images, whose set holds their class
    mean_size: float  # classes in a set
    worst_class: float  # the lowest coverage of one class's images
    answered: float
    answered_right: float | None


class SetLevel(msgspec.Struct, frozen=True):
    """One promise. name: what `--sets` calls it; share: the share of images that is promised.

    thresholds: the probability from which on a class is in the set, one number, or one for each class.
    answers_above: the confidence above which an answer is given; None abstains from everything.
    """

    name: str
    share: float
    thresholds: list[float]
    answers_above: float | None
    measured: MeasuredSets

    def answers(self, probabilities: np.ndarray) -> SetAnswers:
        """-> `set_answers` of float32 [n, classes]."""
        return set_answers(probabilities, self.thresholds, self.answers_above)


class CalibratedSets(msgspec.Struct, frozen=True):
    """The promises of one variant. split, images: what they were calibrated on; note: what else that was used
    for; delta: how likely a calibration sample may break the promise about what is answered."""

    split: str
    images: int
    note: str
    delta: float
    levels: list[SetLevel]

    def level(self, name: str) -> SetLevel:
        """Raises UsageError where there is none of that name."""
        levels = {level.name: level for level in self.levels}
        if name not in levels:
            raise UsageError(f"there are no sets {name!r}. {choices_sentence(name, list(levels))}")
        return levels[name]


class SetAnswers(NamedTuple):
    """member: bool [n, classes], which classes are in an image's set; abstain: bool [n]."""

    member: np.ndarray
    abstain: np.ndarray


def set_answers(
    probabilities: np.ndarray, thresholds: Sequence[float], answers_above: float | None
) -> SetAnswers:
    """float32 [n, classes] -> the set of each image, and whether to abstain from answering, by the numbers of
    a SetLevel.

    The predicted class is in every set: that can only raise the share of sets that hold the right one.
    """
    member = probabilities >= np.asarray(thresholds, probabilities.dtype)
    member[np.arange(len(probabilities)), probabilities.argmax(axis=1)] = True
    if answers_above is None:
        return SetAnswers(member, np.ones(len(probabilities), bool))
    confident = probabilities.max(axis=1) > np.asarray(answers_above, probabilities.dtype)
    return SetAnswers(member, ~confident)


def set_labels(member: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> list[str]:
    """-> the labels of one image's set (bool [classes]), by falling probability; equal ones keep class
    order."""
    order = np.argsort(-probabilities, kind="stable")
    return [classes[number] for number in order[member[order]]]
