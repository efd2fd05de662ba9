"""What TensorRtSession does with a GPU's memory, and what the engine builder makes of TensorRT's messages,
without a GPU."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from export.write.tensorrt_engine import EngineOptions, build_engine
from ffl_deploy.errors import CheckError, OtherMachine, UsageError
from ffl_deploy.manifest import Details, EngineRecord, Precision, Variant
from ffl_deploy.runtime import tensorrt_runtime
from ffl_deploy.runtime.tensorrt_runtime import TensorRtSession
from tests.ffl_deploy.stub_tensorrt import CLASSES, Cuda, tensorrt

VERSION = "10.13.3.9"
RECORD = {
    "flavour": "tensorrt", "version": VERSION, "compute_capabilities": ["9.0"],
    "profile": {"min": 1, "opt": 4, "max": 8}, "source": "model.onnx", "source_sha256": "0" * 64,
    "platform": "Linux x86_64", "build_seconds": 1.0, "log": [],
}  # fmt: skip


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A GPU of compute capability 9.0, and TensorRT."""
    stub = Cuda()
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(VERSION))
    monkeypatch.setattr(tensorrt_runtime, "import_cuda", lambda: stub)
    monkeypatch.setattr("export.write.tensorrt_engine.import_cuda", lambda: stub)
    return stub


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "fp32.engine"
    path.write_bytes(b"an engine")
    return path


def variant(**changes: object) -> Variant:
    details = Details(engine=msgspec.convert({**RECORD, **changes}, EngineRecord))
    return Variant(
        "fp32-engine", "tensorrt", "fp32.engine", "0", 9, Precision("fp32", "fp32"), details=details
    )


@pytest.mark.parametrize("how", ["closed", "closed twice", "forgotten"])
def test_a_session_gives_its_buffers_back(cuda: Cuda, engine: Path, how: str) -> None:
    session = TensorRtSession(engine, variant())
    assert session.run(np.zeros((20, 32, 32, 3), np.uint8)).logits.shape == (20, CLASSES)
    assert sum(cuda.live.values()) == 8 * (32 * 32 * 3 + 2 * 4 * CLASSES)  # of the largest batch
    assert cuda.streams == 1
    if how.startswith("closed"):
        for _ in how.split():
            session.close()
    del session
    gc.collect()
    assert (cuda.live, cuda.streams) == ({}, 0)


def test_what_was_allocated_before_an_error_is_given_back(cuda: Cuda, engine: Path) -> None:
    cuda.fail_after = 2
    with pytest.raises(CheckError, match=r"cudaErrorMemoryAllocation \(out of memory\)"):
        TensorRtSession(engine, variant())
    gc.collect()
    assert (cuda.live, cuda.streams) == ({}, 0)


def test_an_engine_of_another_gpu_does_not_run_here(cuda: Cuda, engine: Path) -> None:
    cuda.capability = (7, 5)
    with pytest.raises(OtherMachine, match=r"compute capability 9\.0, this GPU has 7\.5"):
        TensorRtSession(engine, variant())
    assert cuda.live == {}


def test_an_engine_is_built_although_tactics_were_skipped(
    cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT 10 logs each tactic that it cannot use as an error and builds the engine without it
    (NVIDIA/TensorRT #4028)."""
    complaint = (
        "Error Code: 9: Skipping tactic 0xfe80445f7bb61a99 due to exception Assertion vol == GK failed."
    )
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(VERSION, complaint))
    source = tmp_path / "model.onnx"
    source.write_bytes(b"a model")
    record = build_engine(source, tmp_path / "fp32.engine", 32, 32, EngineOptions("tensorrt"))
    assert (tmp_path / "fp32.engine").read_bytes() == b"an engine"
    assert record.log == [complaint]
    assert (record.compute_capabilities, record.gpu) == (["9.0"], "NVIDIA Stub"), (
        "the GPU that it was built on, and for"
    )


def test_what_the_builder_cannot_build_is_refused_with_its_reason(
    cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(VERSION, "no kernel for this layer", builds=False))
    source = tmp_path / "model.onnx"
    source.write_bytes(b"a model")
    with pytest.raises(
        CheckError, match=r"tensorrt cannot build model\.onnx for compute capability 9\.0: no kernel"
    ):
        build_engine(source, tmp_path / "fp32.engine", 32, 32, EngineOptions("tensorrt"))
    assert not (tmp_path / "fp32.engine").exists()


def test_a_capability_is_refused_where_tensorrt_takes_none(cuda: Cuda, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(b"a model")
    with pytest.raises(
        UsageError, match="builds for this machine's GPU only; leave --compute-capability out"
    ):
        build_engine(source, tmp_path / "fp32.engine", 32, 32, EngineOptions("tensorrt", ("9.0",)))
