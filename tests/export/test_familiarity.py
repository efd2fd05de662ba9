"""The output familiarity: what the formula says, a threshold that keeps its share, and pictures that show
nothing told from images like the training images."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from export.cli import main
from export.drawn import KINDS, draw
from export.outputs.familiarity import (
    BEYOND,
    LEAST_ENTROPY,
    SHRINKAGE,
    auroc,
    familiarity,
    fitted,
    parts,
    threshold,
)
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import load_data
from ffl_deploy.run_directory import Run


def test_it_is_how_sure_the_classifier_is_and_how_far_beyond_the_usual_the_picture() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    early = generator.normal(size=(200, 6)) @ generator.normal(size=(6, 6)) + 3 * labels[:, None]
    logits = generator.normal(0, 3, (200, 4))
    tensors = [torch.from_numpy(values).float() for values in (early, logits)]
    constants = fitted(*tensors, torch.from_numpy(labels))
    found = familiarity(*tensors, constants).numpy()

    means = np.stack([early[labels == c].mean(axis=0) for c in range(4)])
    rest = early - means[labels]
    covariance = rest.T @ rest / len(rest)
    covariance += SHRINKAGE * np.trace(covariance) / 6 * np.eye(6)
    inverse = np.linalg.inv(covariance)
    distance = np.array([min(np.sqrt((x - m) @ inverse @ (x - m)) for m in means) for x in early])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    sure = -np.log(LEAST_ENTROPY - (p * np.log(p)).sum(axis=1))
    far = np.maximum((distance - distance.mean()) / distance.std() - BEYOND, 0)
    assert 5 < (far > 0).sum() < 50  # the test needs both kinds
    np.testing.assert_allclose(found, (sure - sure.mean()) / sure.std() - far, atol=2e-3)


def test_logits_of_any_size_have_an_entropy() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, -1e4, -1e4]])
    found = parts(torch.zeros(3, 2), logits, fitted(torch.zeros(3, 2), logits, torch.zeros(3).long()))
    least, most = -np.log(LEAST_ENTROPY), -np.log(np.log(3) + LEAST_ENTROPY)
    np.testing.assert_allclose(found["sureness"], [least, most, most], rtol=1e-5)


def test_features_that_are_all_the_same_have_a_covariance_too() -> None:
    constants = fitted(torch.ones(20, 5), torch.zeros(20, 3), torch.zeros(20, dtype=torch.int64))
    assert torch.isfinite(familiarity(torch.zeros(2, 5), torch.zeros(2, 3), constants)).all()


def test_the_threshold_keeps_its_share_of_new_images_on_average() -> None:
    generator = np.random.default_rng(0)
    kept = [
        (generator.normal(size=500) >= threshold(generator.normal(size=60), 0.9)).mean() for _ in range(400)
    ]
    assert 0.9 <= np.mean(kept) < 0.93
    assert threshold(np.array([3.0, 1.0, 2.0]), 0.95) == 1.0


def test_auroc_counts_pairs() -> None:
    higher, lower = np.array([1.0, 2.0, 2.0]), np.array([0.0, 2.0])
    pairs = [(h > low) + 0.5 * (h == low) for h in higher for low in lower]
    assert auroc(higher, lower) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_pictures_are_the_same_for_the_same_seed(kind: str) -> None:
    one, again, other = (draw(kind, 12, 20, 5, seed) for seed in (0, 0, 1))
    assert one.shape == (5, 12, 20, 3)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.fixture(scope="module")
def knowing(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The digits run's fused classifier with the output, in fp32 and int8."""
    out = tmp_path_factory.mktemp("familiarity")
    flags = ["--target", "fused", "--familiarity", "--precision", "int8", "--precision", "fp16"]
    assert main([str(digits_run.folder), *flags, "--runtime", "openvino", "--out", str(out)]) == 0
    return load_bundle(out / "fused")


@pytest.mark.parametrize("name", ["fp32", "int8", "fp16"])
def test_what_shows_nothing_is_told_from_digits(knowing: Bundle, digits_run: Run, name: str) -> None:
    record, session = knowing.variant(name).details.familiarity, knowing.session(name)
    assert record is not None
    data = load_data(digits_run.data)

    def values(images: np.ndarray) -> np.ndarray:
        found = session.run(images).familiarity
        assert found is not None
        return found

    held = values(data.validation.read(slice(None)))
    assert (held >= record.threshold).mean() >= 0.95
    assert (record.split, record.images) == ("validation", len(held))
    test = values(data.test.read(slice(None)))
    assert record.test_kept == pytest.approx((test >= record.threshold).mean(), abs=0.005)
    assert record.test_kept > 0.85
    for kind in KINDS:
        pictures = values(draw(kind, 8, 8))
        assert record.drawn[kind].auroc == pytest.approx(auroc(test, pictures), abs=0.005)
        assert record.drawn[kind].auroc >= 0.95, kind
        assert record.drawn[kind].called_familiar <= 0.2, kind


@pytest.mark.slow
def test_digits_are_told_from_colours(colour_run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("colours")
    assert main([str(colour_run.folder), "--target", "branch0", "--familiarity", "--out", str(out)]) == 0
    bundle, data = load_bundle(out / "branch0"), load_data(colour_run.data)
    from sklearn.datasets import load_digits

    digits = np.repeat((load_digits().images[:200] * 255 / 16).astype(np.uint8)[..., None], 3, axis=3)
    known, strange = (
        bundle.session().run(images).familiarity for images in (data.test.read(slice(None)), digits)
    )
    assert known is not None
    assert strange is not None
    assert auroc(known, strange) >= 0.95


def test_the_card_and_the_manifest_say_it_and_others_do_not(knowing: Bundle, exported: object) -> None:
    card = (knowing.folder / "README.md").read_text()
    assert "## Familiarity" in card
    assert knowing.manifest.outputs[-1].name == "familiarity"
    extras = knowing.variant("int8").details.extras
    assert extras is not None
    assert 0 < extras["familiarity"] < 0.15
    without = load_bundle(f"{exported}/fused")
    assert "Familiarity" not in (without.folder / "README.md").read_text()
    assert b"familiarity" not in msgspec.json.encode(without.manifest)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target", "ensemble"], "--familiarity needs a target with one feature map"),
        (["--reference-only"], "--familiarity is fitted to them"),
    ],
    ids=["ensemble", "reference"],
)
def test_where_it_cannot_be_had_is_said(
    digits_run: Run, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, [str(digits_run.folder), "--familiarity", *flags]) == 2
    assert said in capsys.readouterr().err
