"""The committed CIFAR-100 bundles: they verify here, and answer what their README prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffl_deploy import load_bundle
from ffl_deploy.bundle_checks import check_files, check_parity

EXAMPLES = Path(__file__).parents[1] / "examples" / "cifar100"
VARIANTS = [
    (target, variant) for target in ("fused", "branch0") for variant in ("fp32", "int8", "int8-tensorrt")
]


@pytest.mark.parametrize(("target", "variant"), VARIANTS)
def test_every_committed_variant_gives_pytorchs_logits_on_the_golden_samples(
    target: str, variant: str
) -> None:
    bundle = load_bundle(EXAMPLES / target)
    assert check_files(bundle) == 5
    assert [one.name for one in bundle.manifest.variants] == ["fp32", "int8", "int8-tensorrt"]
    verdict = check_parity(bundle, bundle.variant(variant)).verdict
    assert not verdict.failed, verdict.findings


def test_the_readme_prints_what_the_fused_bundle_answers() -> None:
    text = (EXAMPLES / "README.md").read_text()
    images = sorted((EXAMPLES / "images").glob("*.jpg"))
    for path, prediction in zip(images, load_bundle(EXAMPLES / "fused").predict(images), strict=True):
        (line,) = [line for line in text.splitlines() if f"images/{path.name}: " in line]
        label, percent = line.split(": ")[1].split(",")[0].removesuffix(" %").rsplit(" ", 1)
        assert (label, pytest.approx(float(percent), abs=0.2)) == (
            prediction.label,
            100 * prediction.confidence,
        )
