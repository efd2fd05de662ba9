"""Each metric on arrays whose answer is known, each gate just inside and just outside."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from ffl_deploy.errors import CheckError
from ffl_deploy.parity import (
    ACCURACY_GATES,
    PARITY_GATES,
    Finding,
    ParityRecord,
    compare,
    differ_most,
    gate_precision,
    judge,
    judge_accuracy,
)
from ffl_deploy.runtime import Outputs
from ffl_deploy.runtime.replay import batch_of, images_at_once, measure, passes
from ffl_deploy.statistics import paired_difference


def logits(n: int = 64, classes: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, classes)).astype(np.float32) * 3


def softmax(values: np.ndarray) -> np.ndarray:
    exp = np.exp(values - values.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def test_identical_logits_pass_every_gate() -> None:
    z = logits()
    metrics = compare(z, z, softmax(z))
    assert (metrics.max_abs_diff, metrics.mean_kl, metrics.top1_mismatches) == (0, 0, 0)
    assert metrics.cosine_min == pytest.approx(1)
    assert metrics.logit_std == pytest.approx(z.std(), rel=1e-5)
    for gate in PARITY_GATES.values():
        assert judge({"1": metrics}, gate).status == "passed"


def test_metrics_of_a_known_difference() -> None:
    reference = np.array([[1.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    candidate = np.array([[0.0, 1.0], [0.0, 2.0]], dtype=np.float32)
    metrics = compare(reference, candidate)
    assert metrics.max_abs_diff == 1
    assert metrics.scaled_max_diff == pytest.approx(1 / reference.std())
    assert metrics.cosine_min == pytest.approx(0)
    # KL of softmax(1, 0) from softmax(0, 1) is tanh(1/2); the other row adds none.
    assert metrics.mean_kl == pytest.approx(np.tanh(0.5) / 2)
    assert (metrics.top1_mismatches, metrics.top1_agreement) == (1, 0.5)


def test_the_images_that_differ_most_are_those_that_are_not_finite_then_the_furthest() -> None:
    reference = np.zeros((5, 2), np.float32)
    candidate = np.array([[0, 1], [np.nan, 0], [-3, 0], [0, 0], [0, np.inf]], np.float32)
    assert differ_most(reference, candidate, 5).tolist() == [1, 4, 2, 0, 3]
    assert differ_most(reference, candidate).tolist() == [1]


def test_the_cosine_is_that_of_logits_with_a_direction() -> None:
    """Rounding turns the logits of an image that is equally like all classes; that is no damage.
    Anything else counts."""
    reference = logits()
    norms = np.linalg.norm(reference, axis=1, keepdims=True)
    reference = reference / norms * 10
    reference[0] *= 0.04
    turned = reference.copy()
    turned[0] = reference[0][::-1]
    assert compare(reference, turned).cosine_min == pytest.approx(1)
    turned[0] *= 25  # small in the reference, large in the candidate
    assert compare(reference, turned).cosine_min < 0.9
    lost = reference.copy()
    lost[1] = 0
    assert compare(reference, lost).cosine_min == 0
    halved = reference.copy()
    halved[:, 0] = -halved[:, 0]
    row = reference[1:].astype(np.float64)
    assert compare(reference, halved).cosine_min == pytest.approx(
        (1 - 2 * row[:, 0] ** 2 / 100).min(), abs=1e-6
    )


@pytest.mark.parametrize(("share", "status"), [(0.9e-4, "passed"), (1.2e-4, "failed")])
def test_fp32_gate_is_a_share_of_the_logits_standard_deviation(share: float, status: str) -> None:
    z = logits().astype(np.float64)
    shifted = z.copy()
    shifted[5, 3] += share * z.std()
    verdict = judge({"7": compare(z, shifted)}, PARITY_GATES["fp32"])
    assert verdict.status == status
    if status == "failed":
        assert "max logit difference" in str(verdict.findings[0])
        assert "batch 7" in str(verdict.findings[0])


def test_what_just_breaks_a_gate_is_told_as_another_number_than_the_gate() -> None:
    assert (
        str(Finding("cosine", 0.94997, 0.95, "batch 64")) == "cosine is 0.94997 at batch 64, the gate is 0.95"
    )
    assert str(Finding("cosine", 0.8211, 0.95)) == "cosine is 0.821, the gate is 0.95"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_fail_first_and_alone(bad: float) -> None:
    z = logits()
    broken = z + 100 * logits(seed=1)  # everything else is wrong too
    broken[3, 2] = bad
    for gate in PARITY_GATES.values():
        verdict = judge({"1": compare(z, broken)}, gate)
        assert [finding.metric for finding in verdict.findings] == [
            "number of images with NaN or infinite logits"
        ]
    all_bad = compare(z, np.full_like(z, bad))
    assert all_bad.non_finite == len(z)
    with pytest.raises(CheckError, match="reference"):
        compare(broken, z)


def test_ties_do_not_count_as_disagreement_but_real_margins_do() -> None:
    reference = np.array([[1.0, 1.0 + 1e-6, 0.0], [1.0, 0.5, 0.0]], dtype=np.float64)
    swapped = reference[:, [1, 0, 2]]
    metrics = compare(reference, swapped)
    assert (metrics.top1_mismatches, metrics.top1_ties) == (1, 1)


def test_top5_compares_sets() -> None:
    reference = np.arange(10, 0, -1, dtype=np.float64)[None]
    inside, outside = reference.copy(), reference.copy()
    inside[0, [0, 4]] = inside[0, [4, 0]]  # the same five in another order
    outside[0, [4, 5]] = outside[0, [5, 4]]
    assert compare(reference, inside).top5_mismatches == 0
    assert compare(reference, outside).top5_mismatches == 1
    assert compare(reference[:, :4], reference[:, 3::-1]).top5_mismatches == 0  # four classes have no five


def test_agreement_gates_allow_one_image_and_the_stated_share() -> None:
    assert PARITY_GATES["fp32"].allowed_mismatches(10_000) == 0
    assert PARITY_GATES["int8"].allowed_mismatches(10) == 1
    assert PARITY_GATES["int8"].allowed_mismatches(1000) == 50
    z = logits(1000)
    for changed, status in [(50, "passed"), (51, "failed")]:
        candidate = z.copy()
        for row in range(changed):
            best, second = np.argsort(-z[row])[:2]
            candidate[row, second] = z[row, best] + 1e-3
        gate = msgspec.structs.replace(PARITY_GATES["int8"], cosine_min=-1.0, mean_kl=10.0)
        assert judge({"64": compare(z, candidate)}, gate).status == status


def test_probabilities_must_be_the_softmax_of_the_logits_at_the_temperature() -> None:
    z = logits()
    right = compare(z, z, softmax(z / 1.7), temperature=1.7)
    assert judge({"1": right}, PARITY_GATES["fp32"]).status == "passed"
    wrong = judge({"1": compare(z, z, softmax(z), temperature=1.7)}, PARITY_GATES["fp32"])
    assert [finding.metric for finding in wrong.findings] == ["error of the probabilities"]
    negative = compare(z, z, np.where(np.eye(10, dtype=bool)[z.argmax(1)], np.nan, softmax(z)))
    assert negative.non_finite == len(z)


def test_accuracy_verdicts() -> None:
    right = np.ones(10_000, dtype=bool)

    def lose(count: int, n: int = 10_000, gain: int = 0) -> str:
        reference, candidate = right[:n].copy(), right[:n].copy()
        candidate[:count] = False
        reference[count : count + gain] = False
        return judge_accuracy(paired_difference(reference, candidate), ACCURACY_GATES[precision]).status

    precision = "fp32"
    assert (lose(0, 360), lose(1, 360)) == ("passed", "failed")
    precision = "fp16"
    assert (lose(10), lose(11), lose(1, 360)) == ("passed", "failed", "inconclusive")
    precision = "int8"
    # 30 lost, 10 gained of 10,000: delta -0.20, lower bound -0.34 point. 45 lost alone: lower bound -0.60.
    assert (lose(30, gain=10), lose(45)) == ("passed", "failed")
    # n = 360: 4 lost has p = 1/16, 5 lost p = 1/32.
    assert (lose(0, 360), lose(4, 360), lose(5, 360)) == ("inconclusive", "inconclusive", "failed")


def test_the_coarser_precision_decides_the_gate() -> None:
    assert gate_precision("fp32", "bf16") == "bf16"
    assert gate_precision("fp16", "fp32") == "fp16"
    assert gate_precision("int8", "fp32") == "int8"


def test_records_survive_json_and_can_be_judged_again() -> None:
    z = logits()
    batches = {"1": compare(z, z + 0.01, softmax(z))}
    record = ParityRecord(PARITY_GATES["fp16"], batches, judge(batches, PARITY_GATES["fp16"]))
    stored = msgspec.json.decode(msgspec.json.encode(record), type=ParityRecord)
    assert stored == record
    assert judge(stored.batches, PARITY_GATES["fp32"]).failed


def test_measure_runs_every_batch_size_and_catches_lost_rows() -> None:
    images = np.random.default_rng(0).integers(0, 256, (70, 2, 2, 3), dtype=np.uint8)
    reference = images.reshape(70, -1).astype(np.float32)
    seen: list[int] = []

    def run(batch: np.ndarray) -> Outputs:
        seen.append(len(batch))
        z = batch.reshape(len(batch), -1).astype(np.float32)
        return Outputs(z, softmax(z))

    measured = measure(run, images, reference, [1, 7, 64])
    assert seen == [1] * 64 + [7] * 9 + [1] + [64, 6]
    assert {name: metrics.n for name, metrics in measured.items()} == {"1": 64, "7": 64, "64": 70}
    with pytest.raises(CheckError, match="64 images came back with 63 rows"):
        measure(lambda batch: Outputs(*(part[:-1] for part in run(batch)[:2])), images, reference, [64])


@pytest.mark.parametrize(
    ("count", "side", "expected"),
    [
        (256, 32, 256),
        (256, 96, 256),
        (100, 96, 100),
        (256, 224, 64),
        (1000, 128, 144),
        (5, 2000, 5),
        (0, 32, 0),
    ],
)
def test_large_images_go_in_fewer_at_once(count: int, side: int, expected: int) -> None:
    assert images_at_once(count, side, side) == expected
    rows = [row for part in passes(count, side, side) for row in range(count)[part]]
    assert rows == list(range(count))
    assert all(part.stop - part.start <= expected for part in passes(count, side, side))


@pytest.mark.parametrize(
    ("callers", "side", "expected"), [(2, 32, 64), (16, 32, 64), (2, 96, 64), (2, 192, 32), (16, 224, 8)]
)
def test_several_callers_share_what_goes_at_once(callers: int, side: int, expected: int) -> None:
    """Each keeps the memory of its largest batch: sixteen with 64 of 224 pixels would take fifty GB."""
    assert batch_of(64, callers, side, side) == expected
