"""Schedules at points worked out by hand from the papers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from train.config import OptimisationOptions
from train.recipes import RECIPES
from train.schedule import learning_rate, ramp_up

PLAIN = OptimisationOptions(lr=0.1, warmup=0.0)


def test_paper_recipe_drops_at_150_and_225_of_300_epochs() -> None:
    options = RECIPES["cifar100-resnet32-paper"].optimisation
    steps_per_epoch = 391
    rates = [
        learning_rate(epoch * steps_per_epoch, 300 * steps_per_epoch, options)
        for epoch in (0, 149, 150, 224, 225, 299)
    ]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_one_cycle_rises_and_falls_linearly() -> None:
    options = replace(PLAIN, schedule="onecycle", warmup=0.2)
    rates = [learning_rate(step, 100, options) for step in range(100)]
    assert max(rates) == rates[20] == 0.1
    assert rates[0] == pytest.approx(0.1 / 21)
    assert rates[60] == pytest.approx(0.05)
    assert 0 < rates[99] < 0.1 / 50
    assert sorted(rates[:21]) == rates[:21]


def test_cosine_is_halfway_in_the_middle() -> None:
    options = replace(PLAIN, schedule="cosine")
    assert learning_rate(0, 100, options) == 0.1
    assert learning_rate(50, 100, options) == pytest.approx(0.05)


def test_ramp_up_is_the_papers_curve() -> None:
    assert ramp_up(0, 300, 80 / 300) == pytest.approx(math.exp(-5))
    assert ramp_up(40, 300, 80 / 300) == pytest.approx(math.exp(-1.25))
    assert ramp_up(80, 300, 80 / 300) == 1.0
    assert ramp_up(299, 300, 80 / 300) == 1.0
    assert ramp_up(0, 3, 0.0) == 1.0
