"""A cascade on TensorRT: two engines in one file behind one session, on a stand-in that computes what the
files say; rows are gathered on the host."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from export.cli import main
from export.write.cascade_graph import ALL, NONE
from export.write.tensorrt_engine import Routing, write_engine
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.engine import main as engine_main
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.manifest import Details, Precision, Variant
from ffl_deploy.run_directory import Run
from ffl_deploy.runtime.tensorrt_build import EngineOptions
from ffl_deploy.runtime.tensorrt_cascade import CascadeEngines, joined, parted
from ffl_deploy.verify import main as verify_main
from tests.ffl_deploy.stub_tensorrt import Cuda, install


@pytest.fixture(scope="module")
def built(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The digits run's cascade with its engines; about half of the images are deferred."""
    folder = tmp_path_factory.mktemp("cascade")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        cuda = Cuda()
        install(patch, cuda)
        flags = ["--target", "cascade", "--max-deferred", "0.5", "--tensorrt", "--out", str(folder)]
        assert run_command(main, [str(digits_run.folder), *flags]) == 0
        assert cuda.held == (0, 0, 0), "both engines give back what they held"
    return load_bundle(folder / "cascade")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cuda:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cuda = Cuda()
    install(monkeypatch, cuda)
    return cuda


def test_the_engines_held_every_gate_of_a_cascade(built: Bundle) -> None:
    fp32, engine = built.variant("fp32"), built.variant("fp32-engine")
    assert engine.parity is not None
    assert engine.parity.verdict.status == "passed"
    assert engine.accuracy is not None
    one, other = fp32.details.cascade, engine.details.cascade
    assert one is not None
    assert other is not None
    assert (other.exits, other.threshold) == (one.exits, one.threshold)
    assert other.exit_agreement == 1
    assert other.deferred == pytest.approx(one.deferred, abs=0.005)
    assert [times.batch for times in other.times] == [1, 64]
    assert engine.details.engine is not None
    assert engine.details.engine.source == "model.onnx"


@pytest.mark.parametrize("count", [1, 7, 64])
def test_a_session_gives_what_the_onnx_file_gives(built: Bundle, cuda: Cuda, count: int) -> None:
    images = np.resize(built.golden().images, (count, *built.golden().images.shape[1:]))
    expected = built.session("fp32").run(images)
    session = built.session("fp32-engine")
    answered = session.run(images)
    assert answered.exit is not None
    assert answered.exit.dtype == np.int64
    np.testing.assert_array_equal(answered.exit, expected.exit)
    np.testing.assert_allclose(answered.logits, expected.logits, atol=1e-4)
    np.testing.assert_allclose(answered.probabilities, expected.probabilities, atol=1e-5)
    session.close()
    assert cuda.held == (0, 0, 0)


def test_only_deferred_rows_reach_the_second_engine(
    built: Bundle, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, cuda)
    session = built.session("fp32-engine")
    assert isinstance(session, CascadeEngines)
    images = built.golden().images
    module.runs.clear()  # those on the golden samples, before the first answer
    exits = session.run(images).exit
    assert exits is not None
    deferred = int(exits.sum())
    assert 0 < deferred < len(images), "the test needs both exits"
    assert [rows for _, rows in module.runs] == [len(images), deferred]
    for threshold, second in ((NONE, []), (ALL, [len(images)])):
        module.runs.clear()
        session.at(threshold).run(images)
        assert [rows for _, rows in module.runs] == [len(images), *second]
    session.close()


def test_ffl_verify_opens_them_and_rows_name_the_exit(
    built: Bundle, cuda: Cuda, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(verify_main, [str(built.folder)]) == 0
    assert "fp32-engine on tensorrt: " in capsys.readouterr().out
    assert built.variant("fp32-engine").exits == ["branch0", "fused"]


def test_where_no_engines_were_built_it_is_said(
    built: Bundle, cuda: Cuda, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(engine_main, [str(built.folder)]) == 2
    assert "are built by ffl-export --tensorrt" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--runtime onnxruntime-cuda instead"):
        built.session("fp32", "tensorrt")


def test_a_file_of_two_engines_that_is_cut_is_refused(built: Bundle) -> None:
    content = (built.folder / built.variant("fp32-engine").file).read_bytes()
    parts = parted(content, "fp32.engine")
    assert parts is not None
    assert joined(parts) == content
    assert parted(parts.first, "one engine") is None
    start = content.index(parts.first)
    for damaged in (content[: start + 10], content[:40]):
        with pytest.raises(CheckError, match="export the bundle again"):
            parted(damaged, "fp32.engine")


def test_tensorrt_rtx_builds_both_engines_without_a_gpu(built: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    options = EngineOptions("tensorrt_rtx", ("8.9",))
    routing = Routing(0.5, 1.0, ("branch0", "fused"))
    record = write_engine(built.folder / "model.onnx", tmp_path / "fp32.engine", options, routing)
    parts = parted((tmp_path / "fp32.engine").read_bytes(), "fp32.engine")
    assert parts is not None
    assert record.compute_capabilities == ["8.9"]
    assert (record.source, record.source_sha256) == ("model.onnx", built.variant("fp32").sha256)
    unmeasured = Variant.of_file(
        tmp_path, tmp_path / "fp32.engine", "e", "tensorrt", Precision("fp32", "fp32")
    )
    unmeasured = msgspec.structs.replace(unmeasured, details=Details(engine=record))
    assert unmeasured.exits == ["branch0", "fused"]
    assert (parts.header.threshold, parts.header.temperature) == (0.5, 1.0)
