"""Intervals and tests against published values and against definitions worked out another way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ffl_deploy.statistics import (
    expected_calibration_error,
    fit_temperature,
    log_softmax,
    mcnemar_p,
    paired_difference,
    tango_interval,
    wilson_interval,
)


def test_wilson_interval_gives_newcombes_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81/263, 15/148, 0/20, 1/29.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = wilson_interval(successes, n)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    with pytest.raises(ValueError):
        wilson_interval(0, 0)


def test_tango_interval_gives_the_published_value() -> None:
    # Fagerland, Lydersen and Laake 2014 (Statistics in Medicine 33:2850), Bentur's table 1/1/7/12:
    # Tango's row.
    interval = tango_interval(1, 7, 21)
    assert (interval.low, interval.high) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(0, 0, 360), (1, 1, 360), (7, 19, 10_000), (0, 30, 5000), (3, 0, 3), (0, 4, 4)]
)
def test_tango_interval_inverts_the_constrained_score_test(gained: int, lost: int, n: int) -> None:
    """At a limit, the score statistic with a numerically found constrained maximum-likelihood estimate
    is 1.96."""
    interval = tango_interval(gained, lost, n)
    assert -1 <= interval.low < interval.high <= 1
    for limit in (interval.low, interval.high):
        if abs(limit) == 1:
            continue
        lost_share = np.linspace(max(0.0, -limit), (1 - limit) / 2, 400_001)[1:-1]
        gained_share = lost_share + limit
        with np.errstate(divide="ignore", invalid="ignore"):
            likelihood = (n - gained - lost) * np.log(1 - lost_share - gained_share)
            likelihood += (gained * np.log(gained_share) if gained else 0) + (
                lost * np.log(lost_share) if lost else 0
            )
        best = lost_share[np.nanargmax(likelihood)]
        statistic = (gained - lost - n * limit) / math.sqrt(n * (2 * best + limit * (1 - limit)))
        assert abs(statistic) == pytest.approx(1.959964, rel=2e-2)
    mirrored = tango_interval(lost, gained, n)
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low), abs=1e-9)


def test_tango_interval_does_not_collapse_without_discordant_pairs() -> None:
    interval = tango_interval(0, 0, 360)
    z2 = 1.959964**2
    assert interval.high == pytest.approx(z2 / (360 + z2), abs=1e-6)
    assert interval.low == pytest.approx(-interval.high, abs=1e-9)


def test_exact_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar_p(0, 0) == (1.0, 1.0)
    # 8 lost, 1 gained: P(X >= 8 | 9) = (9 + 1) / 512
    assert mcnemar_p(1, 8) == pytest.approx((10 / 512, 20 / 512))
    assert mcnemar_p(8, 1)[0] == pytest.approx(1 - 1 / 512)
    assert mcnemar_p(5, 5) == (pytest.approx(0.623046875), 1.0)
    assert 0 < mcnemar_p(400, 500)[0] < 1e-3  # large counts neither overflow nor underflow


def test_paired_difference_counts_pairs_not_totals() -> None:
    reference = np.array([True, True, True, False, False, True])
    candidate = np.array([True, False, True, True, False, False])
    result = paired_difference(reference, candidate)
    assert (result.n, result.gained, result.lost) == (6, 1, 2)
    assert result.delta == pytest.approx(-1 / 6)
    assert result.candidate_accuracy == pytest.approx(0.5)
    assert result.interval.low < result.delta < result.interval.high
    with pytest.raises(ValueError):
        paired_difference(reference, candidate[:-1])


def test_expected_calibration_error_of_known_confidences() -> None:
    # Four answers at 0.9 of which two are right (gap 0.4), one at 1.0 that is right (gap 0): (4 * 0.4) / 5.
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.0, 1.0]])
    assert expected_calibration_error(probabilities, np.array([0, 0, 1, 1, 1])) == pytest.approx(0.32)


def test_fitted_temperature_recovers_the_one_that_sharpened_the_logits() -> None:
    generator = np.random.default_rng(0)
    honest = generator.normal(size=(20_000, 6)) * 2
    labels = (np.cumsum(np.exp(log_softmax(honest)), axis=1) > generator.random((20_000, 1))).argmax(axis=1)
    temperature = fit_temperature(honest * 3.0, labels)
    assert temperature is not None
    assert temperature == pytest.approx(3.0, rel=0.03)
    before = expected_calibration_error(np.exp(log_softmax(honest * 3.0)), labels)
    after = expected_calibration_error(np.exp(log_softmax(honest * 3.0 / temperature)), labels)
    assert after < 0.02 < 0.1 < before


def test_no_temperature_without_an_error_to_fit_it_to() -> None:
    """The likelihood of answers that are all right only grows as the temperature falls."""
    labels = np.arange(30) % 3
    assert fit_temperature(np.eye(3)[labels] * 2.0, labels) is None
