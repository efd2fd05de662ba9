"""Export gives what passes, and says of the rest what it was refused for; it replaces nothing but its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import export.formats
import export.pipeline
import export.write.half
from export.cli import main
from ffl_deploy.bundle import load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.errors import CheckError
from ffl_deploy.run_directory import Run
from ffl_deploy.verify import main as verify


def damage(path: Path) -> None:
    """Make one convolution of a 16-bit file another one."""
    model = onnx.load(path)
    conv = [node for node in model.graph.node if node.op_type == "Conv"][3]
    weight = next(one for one in model.graph.initializer if one.name == conv.input[1])
    values = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(-values, weight.name))
    onnx.save(model, path)


def test_a_variant_that_fails_costs_nothing_else(
    digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all targets; what failed is listed with metric and layer on the screen, in the manifest and in the
    report."""
    real = export.write.half.write_half

    def write_half(source: Path, path: Path, *arguments: object) -> object:
        record = real(source, path, *arguments)  # type: ignore[arg-type]
        damage(path)
        return record

    monkeypatch.setattr(export.formats, "write_half", write_half)
    monkeypatch.setattr(export.formats, "check_true_fp16", lambda *_: None)
    out = tmp_path / "out"
    flags = ["--target", "all", "--precision", "fp16", "--out", str(out)]
    assert run_command(main, [str(digits_run.folder), *flags]) == 1
    said = capsys.readouterr()
    for target in ("fused", "ensemble", "branch0", "branch1"):
        folder = out / target
        bundle = load_bundle(folder)
        assert [variant.name for variant in bundle.manifest.variants] == ["fp32"]
        assert not (folder / "model.fp16.onnx").exists()
        (refused,) = bundle.manifest.refused or []
        assert refused.name == "fp16"
        assert "max logit difference / standard deviation is" in refused.reason
        assert "the gate is" in refused.reason
        assert " at target." in refused.reason, "the layer"
        assert f"{target}/fp16: " in said.err
        assert f"{target}: without fp16: variant fp16 does not give" in said.out
        assert run_command(verify, [str(folder)]) == 0
    assert said.err.count("\n") == 1
    assert "The others are in " in said.err
    report = json.loads((out / "report.json").read_text())
    assert [(one["target"], one["variant"]) for one in report["refused"]] == [
        (target, "fp16") for target in ("branch0", "branch1", "ensemble", "fused")
    ]
    page = (out / "report.md").read_text()
    assert "## Refused" in page
    assert "- branch1/fp16: " in page


def test_a_target_that_fails_costs_nothing_else(
    digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = export.pipeline.check_target

    def check(model: object, reference: object, name: str) -> None:
        if name == "branch0":
            raise CheckError("target branch0 in PyTorch does not give the logits that training stored (x).")
        real(model, reference, name)  # type: ignore[arg-type]

    monkeypatch.setattr(export.pipeline, "check_target", check)
    out = tmp_path / "out"
    (out / "branch0").mkdir(parents=True)
    flags = ["--target", "branch0", "--target", "branch1", "--max-bytes", "100000000", "--out", str(out)]
    assert run_command(main, [str(digits_run.folder), *flags]) == 1
    said = capsys.readouterr()
    assert "branch0: no bundle: target branch0 in PyTorch" in said.out
    assert "branch0/fp32: target branch0 in PyTorch does not give" in said.err
    assert run_command(verify, [str(out / "branch1")]) == 0
    assert not list((out / "branch0").iterdir())
    capsys.readouterr()
    for flags in ([], ["--report-only", "--out", str(out)]):  # a report that is written again remembers it
        if flags:
            assert run_command(main, flags) == 0
        page = (out / "report.md").read_text()
        assert "- branch0/fp32: target branch0 in PyTorch does not give" in page
    assert (
        run_command(main, [str(digits_run.folder), "--target", "branch0", "--out", str(tmp_path / "two")])
        == 1
    )
    assert "No bundle was written." in capsys.readouterr().err


def test_a_report_of_bundles_that_all_passed_has_no_such_section(exported: Path, tmp_path: Path) -> None:
    out = shutil.copytree(exported, tmp_path / "bundles")
    assert run_command(main, ["--report-only", "--out", str(out)]) == 0
    assert "refused" not in json.loads((out / "report.json").read_text())
    assert "Refused" not in (out / "report.md").read_text()
    assert "refused" not in json.loads((out / "fused" / "bundle.json").read_text())


def test_what_somebody_added_to_a_bundle_is_not_deleted(
    digits_run: Run, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported / "branch0", out / "branch0")
    (out / "branch0" / ".git").mkdir()
    (out / "branch0" / ".git" / "HEAD").write_text("ref")
    (out / "branch0" / "NOTES.md").write_text("notes")
    flags = [str(digits_run.folder), "--target", "branch0", "--out", str(out)]
    assert run_command(main, flags) == 2
    assert ".git/HEAD, NOTES.md" in capsys.readouterr().err
    assert (out / "branch0" / "NOTES.md").read_text() == "notes"
    (out / "branch0" / "bundle.json").write_text("{}")  # another program's, for all we know
    assert run_command(main, flags) == 2
    assert "Move it away" in capsys.readouterr().err


def test_a_signature_that_was_of_no_bundle_stays(digits_run: Run, tmp_path: Path) -> None:
    (tmp_path / "branch0.sig").write_text("mine")
    assert run_command(main, [str(digits_run.folder), "--target", "branch0", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "branch0.sig").read_text() == "mine"


# what is bound


def test_swapped_channels_are_caught_on_gray_images(
    digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Gather [2, 1, 0] in front of the digits' model: none of their images can show it."""
    real = export.formats.write_onnx

    def write(model: object, path: Path, *arguments: object) -> None:
        real(model, path, *arguments)  # type: ignore[arg-type]
        proto = onnx.load(path)
        for node in proto.graph.node:
            node.input[:] = ["swapped" if name == "images" else name for name in node.input]
        proto.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "order"))
        swap = onnx.helper.make_node("Gather", ["images", "order"], ["swapped"], axis=3)
        proto.graph.node.insert(0, swap)
        onnx.save(proto, path)

    monkeypatch.setattr(export.formats, "write_onnx", write)
    assert run_command(main, [str(digits_run.folder), "--target", "branch0", "--out", str(tmp_path)]) == 1
    assert "does not give PyTorch's logits" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["config", "data"])
def test_an_edited_preprocessing_does_not_get_into_a_bundle(
    digits_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    run = Path(shutil.copytree(digits_run.folder, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    config["preprocessing"]["resize"] = "stretch"
    if where == "data":  # a resize that the data agree with: what training's decoder gave does not
        config["preprocessing"] |= {"resize": "crop", "filter": "lanczos"}
    (run / "config.json").write_text(json.dumps(config))
    assert run_command(main, [str(run), "--target", "branch0", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "is not what" in said or "differs from what training was fed" in said
    assert not (tmp_path / "out").exists()
