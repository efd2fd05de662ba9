"""Precisions and runtimes are rows of tables: what is in the table is offered,
opened and refused without another change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from export.cli import parser
from export.formats import FORMATS, Format, ModelFile
from export.variants import VariantOptions, check_runtimes, open_file
from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import UsageError
from ffl_deploy.manifest import Variant
from ffl_deploy.parity import ACCURACY_GATES, PRECISIONS
from ffl_deploy.processor import kernels
from ffl_deploy.runtime import RUNTIMES, OnnxRuntimeSession, Session


def test_every_precision_is_written_and_judged() -> None:
    assert {"fp32", *FORMATS} == set(PRECISIONS) == set(ACCURACY_GATES)


def test_a_runtime_is_a_row(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = []

    def slow(model: Path, variant: Variant, threads: int | None) -> Session:
        opened.append((model.name, variant.name, threads))
        return OnnxRuntimeSession(model, variant.name, threads)

    row = dataclasses.replace(RUNTIMES["onnxruntime"], name="abacus", open=slow)
    monkeypatch.setitem(RUNTIMES, "abacus", row)
    golden = tiny_bundle.golden()
    outputs = tiny_bundle.session(runtime="abacus", threads=1).run(golden.images)
    assert outputs.logits.argmax(axis=1).tolist() == golden.logits.argmax(axis=1).tolist()
    assert opened == [("model.onnx", "fp32", 1)]
    assert parser().parse_args(["--runtime", "abacus"]).runtime == ["abacus"]

    # export opens it, and says what it computed; verdicts are remembered as of any CPU's
    path = tiny_bundle.folder / "model.onnx"
    session, computed, details = open_file(ModelFile("fp32", path, "fp32", ("abacus",)), "abacus", "fp32")
    assert session.run(golden.images).logits.shape == golden.logits.shape
    assert (computed, sum((details.operators or {}).values()) > 0) == ("fp32", True)
    assert kernels("abacus") == kernels("openvino") != kernels("onnxruntime")

    monkeypatch.setitem(RUNTIMES, "abacus", dataclasses.replace(row, reads=(".beads",)))
    with pytest.raises(UsageError, match="which abacus does not read"):
        tiny_bundle.session(runtime="abacus")
    monkeypatch.setitem(RUNTIMES, "abacus", dataclasses.replace(row, reads=".engine"))
    with pytest.raises(UsageError, match="abacus"):  # --tensorrt asks for engines
        parser().parse_args(["--runtime", "abacus"])


def test_what_is_needed_and_not_there_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise UsageError("no beads; buy some.")

    monkeypatch.setitem(
        RUNTIMES, "abacus", dataclasses.replace(RUNTIMES["onnxruntime"], name="abacus", require=absent)
    )
    monkeypatch.setitem(FORMATS, "int4", Format("int4", FORMATS["int8"].write, needs=("abacus",)))
    check_runtimes(VariantOptions(precisions=("fp32",)))
    with pytest.raises(UsageError, match="no beads"):
        check_runtimes(VariantOptions(precisions=("fp32", "int4")))
    with pytest.raises(UsageError, match="no beads"):
        check_runtimes(VariantOptions(runtimes=("onnxruntime", "abacus")))
