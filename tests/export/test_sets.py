"""What --sets promises: held against another library, against simulation, and against an exported bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export.cli import main
from export.sets import Answered, answers_above, binomial_tail, clustered_thresholds, threshold
from ffl_deploy.bundle import load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import load_data
from ffl_deploy.run_directory import Run, load_run
from ffl_deploy.sets import set_answers
from ffl_deploy.statistics import log_softmax


def simulated(images: int, seed: int, classes: int = 20, easy: float = 4.0, hard: float = 2.0) -> Answered:
    """A classifier of images whose odd classes are harder than the even ones."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    logits = generator.normal(0, 1, (images, classes))
    logits[np.arange(images), labels] += np.where(labels % 2, hard, easy)
    return Answered(np.exp(log_softmax(logits.astype(np.float32))), labels)


@pytest.mark.parametrize("share", [0.9, 0.95, 0.99])
def test_the_sets_are_those_of_crepes(share: float) -> None:
    from crepes import ConformalClassifier

    held, new = simulated(400, 0), simulated(200, 1)
    oracle = ConformalClassifier()
    oracle.fit(1 - held.of_truth)
    expected = oracle.predict_set(1 - new.probabilities.astype(float), confidence=share, smoothing=False)
    member = new.probabilities.astype(float) >= threshold(held.of_truth, share)
    np.testing.assert_array_equal(member, expected.astype(bool))


def test_too_few_images_promise_every_class() -> None:
    assert threshold(np.full(8, 0.9), 0.9) == 0  # the 9th of 8
    assert threshold(np.linspace(0.1, 0.9, 9), 0.9) == 0.1  # the worst of 9


@pytest.mark.parametrize("share", [0.9, 0.95])
def test_coverage_is_what_was_promised_on_average(share: float) -> None:
    new = simulated(100_000, 10_000)
    covered = [
        (new.of_truth >= threshold(simulated(500, seed).of_truth, share)).mean() for seed in range(200)
    ]
    assert share - 0.004 < np.mean(covered) < share + 1 / 501 + 0.004


def test_thresholds_by_class_cover_the_hard_classes_too() -> None:
    held, new = simulated(4000, 0), simulated(8000, 1)
    odd = new.labels % 2 == 1

    def coverage(thresholds: list[float]) -> float:
        member = set_answers(new.probabilities, thresholds, None).member
        return float(member[np.arange(len(odd)), new.labels][odd].mean())

    assert coverage([threshold(held.of_truth, 0.9)]) < 0.86  # what one threshold for all does to them
    assert coverage(clustered_thresholds(held, 0.9)) == pytest.approx(0.9, abs=0.02)


def test_few_images_share_one_threshold() -> None:
    held = simulated(60, 0)
    assert clustered_thresholds(held, 0.99) == [threshold(held.of_truth, 0.99)] * 20


@pytest.mark.parametrize("share", [0.8, 0.9])
def test_answers_keep_their_share_in_all_but_a_tenth_of_200_calibrations(share: float) -> None:
    population = simulated(40_000, 7)
    right = population.probabilities.argmax(axis=1) == population.labels
    confidence = population.probabilities.max(axis=1)
    assert right.mean() < share, "abstaining has something to do"
    generator = np.random.default_rng(0)
    violated, answered = 0, []
    for _ in range(200):
        rows = generator.choice(len(right), 1000, replace=False)
        above = answers_above(Answered(population.probabilities[rows], population.labels[rows]), share)
        given = np.zeros(len(right), bool) if above is None else confidence > above
        given[rows] = False  # judged by the images that did not calibrate
        violated += bool(given.any() and right[given].mean() < share)
        answered.append(given.mean())
    assert violated <= 20
    assert np.mean(answered) > 0.2, "a promise that is kept by silence is none"


def test_nothing_is_answered_where_nothing_can_be_shown() -> None:
    wrong = simulated(300, 0)
    assert answers_above(Answered(wrong.probabilities, (wrong.labels + 1) % 20), 0.9) is None


def test_the_binomial_tail_is_scipys() -> None:
    from scipy.stats import binom

    for successes, trials in ((0, 22), (3, 60), (40, 1000)):
        assert binomial_tail(successes, trials, 0.05) == pytest.approx(binom.cdf(successes, trials, 0.05))


@pytest.fixture(scope="module")
def calibrated(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`branch0` of the digits run with and without --sets: two folders."""
    out = tmp_path_factory.mktemp("sets")
    flags = [str(digits_run.folder), "--target", "branch0"]
    assert main([*flags, "--sets", "--out", str(out / "with")]) == 0
    assert main([*flags, "--out", str(out / "without")]) == 0
    return out


def test_a_bundle_carries_the_thresholds_of_its_own_answers(digits_run: Run, calibrated: Path) -> None:
    bundle = load_bundle(calibrated / "with" / "branch0")
    sets = bundle.variant().details.sets
    assert sets is not None
    data = load_data(digits_run.data)
    assert (sets.split, sets.images) == ("validation", len(data.validation))
    assert "chose the epoch" in sets.note
    session = bundle.session()
    held, new = (session.run(part.read(slice(None))).probabilities for part in (data.validation, data.test))
    for level in sets.levels:
        labels = data.validation.labels
        found = np.sort(held[np.arange(len(labels)), labels])[-int(np.ceil((len(labels) + 1) * level.share))]
        assert level.name == f"{100 * level.share:.0f}", "so few images tell no classes apart"
        assert level.thresholds == [pytest.approx(float(found), rel=1e-4)]
        member, abstain = level.answers(new)
        covered = member[np.arange(len(data.test)), data.test.labels]
        assert level.measured.coverage == pytest.approx(covered.mean(), abs=1.5 / len(covered))
        assert level.measured.mean_size == pytest.approx(member.sum() / len(member), abs=3 / len(covered))
        assert level.measured.answered == pytest.approx(1 - abstain.mean(), abs=1.5 / len(covered))
    card = (bundle.folder / "README.md").read_text()
    assert f"| fp32 | 90 | {100 * sets.levels[0].measured.coverage:.2f} % |" in card


def test_nothing_else_of_a_bundle_changes(calibrated: Path) -> None:
    """Who does not ask for sets gets the bundle of before, and who does gets the same files."""
    asked, plain = ((calibrated / name / "branch0") for name in ("with", "without"))
    for name in ("model.onnx", "golden.npz"):
        assert (asked / name).read_bytes() == (plain / name).read_bytes()
    manifest = json.loads((plain / "bundle.json").read_text())
    assert set(manifest["variants"][0]["details"]) == {"operators"}
    assert set(manifest) == {
        "schema", "target", "classes", "input", "outputs", "source", "variants", "golden", "files",
        "toolchain", "calibration", "verified_on",
    }  # fmt: skip
    assert "abstain" not in (plain / "README.md").read_text().lower()


def test_a_calibration_split_neither_trains_nor_chooses(digits_run: Run) -> None:
    import msgspec

    whole = load_data(digits_run.data)
    apart = load_data(msgspec.structs.replace(digits_run.data, calibration=0.5))
    assert apart.calibration is not None
    assert np.array_equal(apart.train.read(slice(None)), whole.train.read(slice(None)))
    parts = [apart.validation, apart.calibration]
    pixels = [image.tobytes() for part in parts for image in part.read(slice(None))]
    assert sorted(pixels) == sorted(image.tobytes() for image in whole.validation.read(slice(None)))
    assert abs(len(parts[0]) - len(parts[1])) <= len(whole.classes)


def test_a_run_with_a_calibration_split_calibrates_on_it(tmp_path: Path) -> None:
    from train.run import main as train

    flags = ["--branches", "resnet8", "--method", "vanilla", "--epochs", "1", "--device", "cpu", "--quiet"]
    split = ["--validation", "0.3", "--calibration-split", "0.5"]
    assert train([*flags, *split, "--precision", "fp32", "--out", str(tmp_path / "run")]) == 0
    run = load_run(tmp_path / "run")
    counts = run.config.split["images_per_class"]
    assert main([str(run.folder), "--target", "branch0", "--sets", "--out", str(tmp_path / "out")]) == 0
    sets = load_bundle(tmp_path / "out" / "branch0").variant().details.sets
    assert sets is not None
    assert (sets.split, sets.images, sets.note) == ("calibration", sum(counts["calibration"]), "")
    assert sum(counts["calibration"]) > 150


def test_sets_need_the_data(digits_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, [str(digits_run.folder), "--sets", "--reference-only"]) == 2
    assert "--sets is calibrated on them" in capsys.readouterr().err
