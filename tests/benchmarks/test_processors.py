"""What a bundle says of the processors that held its gates, and how it is recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from benchmarks import processors
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.bundle_checks import check_files
from ffl_deploy.command import run_command
from ffl_deploy.processor import description
from ffl_deploy.verified_on import Outcome, VerifiedOn, processor_table, with_record


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "tiny")


def test_native_outcomes_are_recorded_in_manifest_and_card(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not bundle.manifest.verified_on, "a bundle made before this was recorded says nothing"
    assert "verified_on" not in json.loads((bundle.folder / "bundle.json").read_text())
    for _ in range(2):  # the second replaces the first
        assert run_command(processors.main, [str(bundle.folder), "--processor", "native", "--record"]) == 0
    again = load_bundle(bundle.folder)
    (record,) = again.manifest.verified_on
    assert (record.processor, record.emulated) == (description(), None)
    assert record.variants["fp32"].gate == "passed"
    assert record.variants["fp32"].runtime.startswith("onnxruntime 1.")
    assert record.variants["fp32"].computed == "fp32"
    check_files(again)
    assert f"| {description()} | fp32 |" in (bundle.folder / "README.md").read_text()
    assert f"| {description()} | fp32 |" in capsys.readouterr().out


def test_a_failed_gate_is_recorded_and_ends_with_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = VerifiedOn("other", "qemu", {"fp32": Outcome("onnxruntime 1.0", "fp32", "failed", None)})
    monkeypatch.setattr(processors, "emulated_outcomes", lambda *_: failed)
    assert run_command(processors.main, [str(bundle.folder), "--processor", "Haswell", "--record"]) == 1
    assert load_bundle(bundle.folder).manifest.verified_on == [failed]
    assert (
        "| other (emulated by qemu) | fp32 | onnxruntime 1.0 | fp32 | failed | not finite |"
        in processor_table([failed])
    )


def test_a_signed_or_changed_bundle_is_not_recorded_in(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(bundle.folder), "--processor", "native", "--record"]
    signature = bundle.folder.with_name(bundle.folder.name + ".sig")
    signature.write_text("{}")
    before = (bundle.folder / "bundle.json").read_bytes()
    assert run_command(processors.main, arguments) == 2
    assert "is signed" in capsys.readouterr().err
    signature.unlink()
    (bundle.folder / "model.onnx").write_bytes(b"changed")
    assert run_command(processors.main, arguments) == 1
    assert (bundle.folder / "bundle.json").read_bytes() == before


def test_without_the_emulator_it_says_what_to_install(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert run_command(processors.main, [str(bundle.folder), "--processor", "Haswell"]) == 2


def test_records_of_real_and_emulated_processors_stand_side_by_side() -> None:
    one, other = VerifiedOn("p", None, {}), VerifiedOn("p", "qemu", {})
    assert with_record([one], other) == [one, other]
    newer = msgspec.structs.replace(one, variants={"fp32": Outcome("r 1", "fp32", "passed", 0.0)})
    assert with_record([one, other], newer) == [other, newer]
