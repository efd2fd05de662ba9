"""A cascade: its threshold keeps its promise, its file routes as PyTorch does and gives both exits'
answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.cascade import SURE, Cascade, Exits, Promise, choose_threshold
from export.check.evaluation import Reference
from export.cli import main
from export.formats import routed_reference
from export.golden import GOLDEN_IMAGES
from export.pipeline import ExportOptions, asked_targets
from export.sets import CalibrationImages
from export.write.cascade_graph import ALL, NONE, write_threshold
from ffl_deploy.bundle import load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import ArraySplit
from ffl_deploy.errors import CheckError
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.networks.targets import target_names
from ffl_deploy.run_directory import Run
from ffl_deploy.runtime import OnnxRuntimeSession
from ffl_deploy.verify import main as verify

CLASSES = 20


def simulated(images: int, seed: int = 0) -> tuple[Exits, np.ndarray]:
    """Two classifiers of the same images: what the first one is unsure of, the last one knows better."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, images)
    common = generator.normal(0, 1, (images, CLASSES))
    common[np.arange(images), labels] += generator.uniform(0, 6, images)
    first, last = (common + generator.normal(0, noise, common.shape) for noise in (0.7, 0.3))
    return Exits(first, last), labels


def held_out(labels: np.ndarray) -> CalibrationImages:
    return CalibrationImages(ArraySplit(np.zeros((len(labels), 1, 1, 3), np.uint8), labels), "calibration")


@pytest.mark.parametrize("promise", [Promise(1.0), Promise(None, 0.3)], ids=["loss", "deferred"])
def test_the_promise_is_broken_by_at_most_a_tenth_of_200_calibrations(promise: Promise) -> None:
    exits, labels = simulated(20_000)
    first, last = (logits.argmax(axis=1) == labels for logits in exits)
    scores = exits.scores
    generator = np.random.default_rng(1)
    broken, shares = 0, []
    for _ in range(200):
        rows = generator.choice(len(labels), 1000, replace=False)
        held = Exits(exits.first[rows], exits.last[rows])
        threshold = choose_threshold(held, labels[rows], promise, held_out(labels[rows])).value
        others = np.ones(len(labels), bool)
        others[rows] = False
        deferred = scores < threshold
        loss = 100 * (last[others].mean() - np.where(deferred, last, first)[others].mean())
        shares.append(deferred[others].mean())
        limit = promise.max_loss_points if promise.max_deferred is None else promise.max_deferred
        assert limit is not None
        broken += bool((loss if promise.max_deferred is None else shares[-1]) > limit)
    assert broken <= 20
    assert 0.05 < np.mean(shares) < 0.9, "one that defers everything, or nothing, is no cascade"


@pytest.mark.parametrize("promise", [Promise(1.0), Promise(None, 0.3)], ids=["loss", "deferred"])
def test_another_files_threshold_is_shared_where_it_keeps_the_promise_too(promise: Promise) -> None:
    exits, labels = simulated(2000)
    own = choose_threshold(exits, labels, promise, held_out(labels)).value
    safe, unsafe = (own + 0.05, own - 0.05) if promise.max_deferred is None else (own - 0.05, own + 0.05)
    found = [
        choose_threshold(exits, labels, promise, held_out(labels), shared=shared) for shared in (safe, unsafe)
    ]
    assert [one.value for one in found] == pytest.approx([safe, own])
    assert found[0].deferred == pytest.approx((exits.scores < safe).mean())


def test_what_cannot_be_shown_is_refused() -> None:
    exits, labels = simulated(60)
    with pytest.raises(CheckError, match="give more images with --calibration-split"):
        choose_threshold(exits, labels, Promise(0.01), held_out(labels))
    exits, labels = simulated(2000)
    with pytest.raises(CheckError, match="and defers at most"):
        choose_threshold(exits, labels, Promise(0.5, 0.001), held_out(labels))


@pytest.mark.parametrize("threshold", [0.7, 0.8], ids=["fp32's threshold", "another one"])
def test_a_files_logits_are_compared_where_its_rounding_does_not_choose_the_exit(threshold: float) -> None:
    """One image near the threshold that int8 sends to the other exit has another classifier's logits: its
    cosine alone cost the file its place."""
    exits, labels = simulated(400)
    whole = Reference(np.zeros((400, 1, 1, 3), np.uint8), labels, exits.first)
    first = choose_threshold(exits, labels, Promise(None, 0.5), held_out(labels))
    target = Cascade(("branch0", "fused"), Promise(), first, exits)
    exact, rounded = (routed_reference(target, whole, threshold, precision) for precision in ("fp32", "int8"))
    assert len(exact.labels) > 390
    odds = np.log(exits.scores / (1 - exits.scores)) - np.log(threshold / (1 - threshold))
    far = np.abs(odds) > SURE
    assert 100 < far.sum() < 390
    np.testing.assert_array_equal(rounded.labels, labels[far])
    expected = np.where((odds < 0)[:, None], exits.last, exits.first)
    np.testing.assert_array_equal(rounded.logits, expected[far])


@pytest.fixture(scope="module")
def cascade(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits run's cascade in fp32, its threshold at half of the images so that both exits answer."""
    out = tmp_path_factory.mktemp("cascade")
    flags = ["--target", "cascade", "--max-deferred", "0.5", "--runtime", "openvino", "--out", str(out)]
    assert main([str(digits_run.folder), *flags]) == 0
    return out / "cascade"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_rows_leave_by_their_exit_whether_none_some_or_all_are_deferred(
    cascade: Path, digits_run: Run, runtime: str
) -> None:
    bundle = load_bundle(cascade)
    session = bundle.session(runtime=runtime)
    images, _, first = digits_run.reference("best", "branch0")
    exits = Exits(first, digits_run.reference("best", "fused")[2])
    record = bundle.variant().details.cascade
    assert record is not None
    assert record.exits == ["branch0", "fused"]
    sure = ~exits.edge(record.threshold.value)
    deferred = exits.deferred(record.threshold.value)
    assert 0 < deferred[sure].sum() < sure.sum(), "the test needs both kinds"
    for rows in (sure, sure & deferred, sure & ~deferred):
        answered = session.run(images[rows])
        assert answered.exit is not None
        np.testing.assert_array_equal(answered.exit, deferred[rows])
        expected = exits.routed(record.threshold.value)[rows]
        np.testing.assert_allclose(answered.logits, expected, atol=1e-3 * expected.std())


def test_another_threshold_gives_one_exit_alone(cascade: Path, digits_run: Run, tmp_path: Path) -> None:
    for name, threshold in (("branch0", NONE), ("fused", ALL)):
        images, _, logits = digits_run.reference("best", name)
        path = write_threshold(cascade / "model.onnx", tmp_path / f"{name}.onnx", threshold)
        answered = OnnxRuntimeSession(path, name).run(images[:9]).logits
        np.testing.assert_allclose(answered, logits[:9], atol=1e-3 * logits.std())


def test_golden_samples_leave_by_the_same_exit_on_every_processor(cascade: Path, tmp_path: Path) -> None:
    """int8 rounds more than 1e-4: a sample at the threshold would be another classifier's answer there."""
    bundle = load_bundle(cascade)
    record = bundle.variant().details.cascade
    assert record is not None
    path = write_threshold(cascade / "model.onnx", tmp_path / "first.onnx", NONE)
    samples = bundle.golden()
    exits = bundle.session().run(samples.images).exit
    assert exits is not None
    assert exits.sum() == GOLDEN_IMAGES // 2, "both parts of the graph are looked at"
    logits = OnnxRuntimeSession(path, "first").run(samples.images).logits
    scores, threshold = Exits(logits, logits).scores, record.threshold.value
    odds, limit = scores / (1 - scores), threshold / (1 - threshold)
    assert np.maximum(odds / limit, limit / odds).min() > np.exp(SURE) - 0.01
    assert len(samples.images) == GOLDEN_IMAGES


def test_made_up_pictures_leave_by_pytorchs_exit_too(
    cascade: Path, digits_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = load_bundle(cascade)
    probes, record = bundle.probes(), bundle.variant().details.cascade
    assert probes is not None
    assert record is not None
    stored = [digits_run.probes("best", name) for name in record.exits]
    logits = [one.logits for one in stored if one is not None]
    known = np.isfinite(probes.logits).all(axis=1)
    assert known.any()
    expected = Exits(*logits).routed(record.threshold.value)
    np.testing.assert_array_equal(probes.logits[known], expected[known])
    assert verify([str(cascade)]) == 0
    assert "pictures decoded and resized as in training" in capsys.readouterr().out


def test_rows_and_card_name_the_exit(cascade: Path, tmp_path: Path) -> None:
    import json

    from PIL import Image

    from serve.predict.command import main as predict

    bundle = load_bundle(cascade)
    images = bundle.golden().images[:12]
    (tmp_path / "in").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "in" / f"{number:02d}.png")
    out = tmp_path / "rows.jsonl"
    assert predict([str(cascade), str(tmp_path / "in"), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    exits = bundle.session().run(images).exit
    assert exits is not None
    assert [row["exit"] for row in rows] == [("branch0", "fused")[number] for number in exits]
    assert "`branch0` answers where it is sure enough" in (cascade / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target", "cascade", "--batch", "4"], "how many images are deferred differs"),
        (["--target", "cascade", "--precision", "fp16"], "fp32 and int8"),
        (["--target", "fused+branch0"], "its first exit is a branch"),
        (["--target", "cascade", "--max-deferred", "30"], "--max-deferred 30 is no share"),
        (["--target", "fused", "--max-deferred", "0.3"], "--max-deferred is about a cascade"),
        (["--max-loss-points", "1"], "--max-loss-points is about a cascade"),
        (["--target", "cascade", "--reference-only"], "its threshold is chosen on held-out images"),
    ],
    ids=["batch", "fp16", "exits", "share", "no cascade", "no target", "reference"],
)
def test_what_a_cascade_cannot_be_is_said(
    digits_run: Run, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, [str(digits_run.folder), *flags]) == 2
    assert said in capsys.readouterr().err


def test_all_and_a_cascade_are_both_exported(digits_run: Run, tmp_path: Path) -> None:
    network = load_network(digits_run).network
    asked = ExportOptions(("all", "cascade", "fused"), tmp_path)
    assert asked_targets(network, asked, digits_run) == [*target_names(network), "cascade"]
