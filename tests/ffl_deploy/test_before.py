"""What earlier versions wrote is read, and what is written now has the same bytes.

tests/fixtures/before/ was made by commit 78f6e2a, whose measurements were untyped dictionaries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ffl_deploy.bundle import load_bundle
from ffl_deploy.bundle_checks import check_files, check_parity
from ffl_deploy.manifest import MANIFEST, Manifest, read_manifest, write_manifest

ROOT = Path(__file__).parents[2]
BEFORE = ROOT / "tests" / "fixtures" / "before"
TABLES = {
    "files",
    "toolchain",
    "batches",
    "images_per_second",
    "operators",
    "layers",
    "extras",
    "profile",
    "preprocessing",
}
MANIFESTS = sorted([*BEFORE.rglob("*.json"), *ROOT.glob(f"examples/cifar100/*/{MANIFEST}")])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_manifest_from_before_is_written_again_byte_by_byte(path: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path, read_manifest(path))
    assert (tmp_path / MANIFEST).read_bytes() == path.read_bytes()


def test_the_stored_manifests_hold_every_kind_of_measurement() -> None:
    """Else the test above would compare nothing."""
    manifests = [read_manifest(path) for path in MANIFESTS]
    variants = [variant for manifest in manifests for variant in manifest.variants]
    details = [variant.details for variant in variants]
    new = {"certificate", "half", "sets", "cascade", "familiarity"}  # which those had not yet
    for name in set(type(details[0]).__struct_fields__) - new:
        assert any(getattr(one, name) for one in details), name
    assert any(variant.parity is None for variant in variants)
    assert any(variant.parity and variant.accuracy and variant.latency for variant in variants)
    assert any(manifest.calibration for manifest in manifests)


def test_a_bundle_from_before_verifies_and_predicts() -> None:
    bundle = load_bundle(BEFORE / "bundle")
    check_files(bundle)
    assert [variant.name for variant in bundle.manifest.variants] == ["fp32", "int8", "int8-tensorrt", "fp16"]
    for name in ("fp32", "fp16"):
        assert check_parity(bundle, bundle.variant(name)).verdict.status == "passed"
    golden = bundle.golden()
    predictions = bundle.predict(list(golden.images))
    assert [prediction.label_id for prediction in predictions] == golden.logits.argmax(axis=1).tolist()
    np.testing.assert_allclose([prediction.logits for prediction in predictions], golden.logits, atol=1e-3)
    int8 = bundle.variant("int8")
    assert int8.accuracy is not None
    assert int8.details.quantisation is not None
    assert int8.accuracy.n == 359
    assert int8.details.quantisation.chosen in int8.details.quantisation.candidates


def test_what_a_newer_version_says_besides_is_left_out() -> None:
    """Every object of a manifest gets a field that this version does not know. Preprocessing is the
    exception: an answer that leaves a step of it out is wrong."""
    path = BEFORE / "bundle" / MANIFEST
    newer = msgspec.json.encode(widened(msgspec.json.decode(path.read_bytes())))
    assert newer.count(b"of a newer version") > 50
    assert msgspec.json.decode(newer, type=Manifest) == read_manifest(path)


def widened(value: Any, name: str = "") -> Any:
    """-> `value` with one more field in each object, but for those whose names are data."""
    if isinstance(value, dict):
        inner = {key: widened(item, key) for key, item in value.items()}
        return inner if name in TABLES else {**inner, "of a newer version": [1]}
    return [widened(item) for item in value] if isinstance(value, list) else value
