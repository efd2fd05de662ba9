"""Small doubts that an adversarial reading left, each proven or put right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.command import run_command
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


def test_a_clock_set_forward_removes_no_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of this hour: files' times are of the clock on the wall."""
    pytest.importorskip("gradio")
    from serve.demo import ages, sessions

    clock = 1000.0
    monkeypatch.setattr(ages.time, "monotonic", lambda: clock)
    (tmp_path / "hash").mkdir()
    upload = tmp_path / "hash" / "photo.png"
    upload.write_bytes(b"x")
    os.utime(upload, (0, 0))  # the clock was in 1970 when it was written; no way to set a change's time
    kept = ages.Ages()
    assert sessions.prune(tmp_path, 3600, set(), kept) == set()
    clock += 3601
    assert sessions.prune(tmp_path, 3600, set(), kept) == {str(upload)}
    assert not upload.parent.exists()


def test_files_that_are_gone_are_forgotten() -> None:
    from serve.demo.ages import Ages

    ages = Ages()
    for path in ("a", "b"):
        ages(path, 1)
    ages.forget_others(["b"])
    assert list(ages._seen) == ["b"]


def test_a_signature_can_be_required_wherever_a_bundle_is_used(
    tiny_bundle: Bundle,
    tmp_path: Path,
    signing_keys: Callable[[str], tuple[Path, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """ffl-verify alone could ask for one: whoever swapped a bundle and its hashes was served."""
    from PIL import Image

    from ffl_deploy.signing import sign_bundle
    from serve.command import main as serve_main
    from serve.command import parse_arguments
    from serve.predict.command import main as predict_main
    from serve.server.models import open_model

    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "b"))
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    (private, public), out = signing_keys("ours"), tmp_path / "rows.jsonl"
    predict = [str(folder), str(tmp_path / "image.png"), "--out", str(out), "--quiet", "--public-key"]
    serve = [str(folder), "--no-demo", "--port", "0", "--public-key"]

    def refused(key: Path, words: str) -> None:
        for main, arguments in ((predict_main, predict), (serve_main, serve)):
            assert run_command(main, [*arguments, str(key)]) == 1
            assert words in capsys.readouterr().err
        with pytest.raises(CheckError, match=words):
            load_bundle(folder, key)
        assert not out.exists()

    refused(public, "has no signature")
    sign_bundle(folder, private)
    refused(signing_keys("theirs")[1], "by this key")
    assert run_command(predict_main, [*predict, str(public)]) == 0
    settings = parse_arguments([*serve, str(public)])
    model = open_model(settings.models[0], settings, lambda name, images, seconds: None)
    assert model.bundle.classes == tiny_bundle.classes
    out.unlink()
    (folder / "README.md").write_text("another card")
    refused(public, "do not use this bundle")


@pytest.mark.parametrize(("mode", "said"), [(0o644, True), (0o640, False), (0o600, False)], ids=oct)
def test_a_token_that_everybody_can_read_is_said(tmp_path: Path, mode: int, said: bool) -> None:
    """Not refused: Kubernetes mounts secrets so, unless it is told otherwise."""
    from serve.lifecycle import readable_by_all

    (tmp_path / "token").write_text("0123456789abcdef")
    (tmp_path / "token").chmod(mode)
    (tmp_path / "link").symlink_to("token")
    assert readable_by_all(tmp_path / "link") is said


def test_the_servers_log_says_it_first(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef")
    (tmp_path / "token").chmod(0o644)
    command = [sys.executable, "-m", "serve.command", str(tiny_bundle.folder), "--no-demo", "--port", "0"]
    command += ["--token-file", str(tmp_path / "token")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        first = json.loads(process.stderr.readline())
        assert (first["level"], first["file"]) == ("warning", str(tmp_path / "token"))
        assert "can read the token" in first["message"]
        assert "0123456789abcdef" not in json.dumps(first)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0
