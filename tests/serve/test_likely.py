"""Small doubts that an adversarial reading left, each proven or put right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.errors import CheckError
from ffl_deploy.statistics import expected_calibration_error
from serve.predict.labelled import BINS, count_labels
from serve.predict.labelled_report import make_report
from serve.rows import OK, Row
from serve.server.settings import ModelSpec, listed_bundles


def test_the_manifest_and_ffl_predict_have_one_calibration_error() -> None:
    """On the edges of the bins, where confidences of 1, 0.2 and 0.6 sit: (k/15, (k+1)/15] in both."""
    confidences = [k / BINS for k in range(1, BINS + 1)] * 2
    right = [index % 3 == 0 for index in range(len(confidences))]
    rows = [
        Row(
            path=str(index),
            status=OK,
            error=None,
            label="a" if correct else "b",
            label_id=0 if correct else 1,
            confidence=confidence,
            top_k_labels=["a"],
            top_k_confidences=[confidence],
            width=1,
            height=1,
        )
        for index, (confidence, correct) in enumerate(zip(confidences, right, strict=True))
    ]
    report = make_report(count_labels(rows, ["a"] * len(rows), ["a", "b"]), ["a", "b"], top_k=1)
    # the same rows as probabilities: the rest of each goes to many classes, so that the first place is the
    # first
    probabilities = np.zeros((len(rows), 100))
    for index, confidence in enumerate(confidences):
        probabilities[index] = (1 - confidence) / 99
        probabilities[index, 0 if right[index] else 1] = confidence
    wanted = expected_calibration_error(probabilities, np.zeros(len(rows), np.int64))
    assert report.expected_calibration_error == pytest.approx(wanted, abs=1e-12)


def test_two_classes_of_one_name_are_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "b"))
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["classes"] = ["cat", "dog", "cat"]
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckError, match="two classes called 'cat'"):
        load_bundle(folder)


def test_a_path_with_an_equals_sign_or_a_comma_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`/data/date=2026/fused` was cut at its equals sign, a comma inside a path split it."""
    monkeypatch.chdir(tmp_path)
    for name in ("date=2026/fused", "a,b/fused", "plain"):
        (tmp_path / name).mkdir(parents=True)
    here = str(tmp_path)
    text = f"plain,{here}/date=2026/fused,cats={here}/date=2026/fused,a,b/fused,dogs=plain,none"
    found = listed_bundles(text)
    assert found == [
        f"{here}/plain",
        f"{here}/date=2026/fused",
        f"cats={here}/date=2026/fused",
        f"{here}/a,b/fused",
        f"dogs={here}/plain",
        f"{here}/none",
    ]
    specs = [ModelSpec.parse(one) for one in found]
    assert [spec.name for spec in specs] == ["plain", "fused", "cats", "fused", "dogs", "none"]
    assert str(specs[2].folder) == f"{here}/date=2026/fused"
