"""Engines are built for real through tensorrt_rtx, which needs no GPU; running them needs one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from export.write.tensorrt_engine import write_engine
from ffl_deploy.bundle import load_bundle
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import sha256_of
from ffl_deploy.manifest import Details, EngineRecord, Precision, Variant
from ffl_deploy.parity import PARITY_GATES
from ffl_deploy.runtime.gpu import Gpu, this_gpu
from ffl_deploy.runtime.tensorrt_build import EngineOptions, build
from ffl_deploy.runtime.tensorrt_cache import Engine, bundled
from ffl_deploy.runtime.tensorrt_runtime import TensorRtSession, check_machine

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
ADA = EngineOptions("tensorrt_rtx", ("8.9",))


def record(**changes: object) -> EngineRecord:
    values = {
        "flavour": "tensorrt_rtx",
        "version": "1.7",
        "compute_capabilities": ["8.9"],
        "profile": {"min": 1, "opt": 64, "max": 256},
        "source": "model.onnx",
        "source_sha256": "0" * 64,
        "platform": "Linux x86_64",
        "build_seconds": 0.1,
        "log": [],
    }
    return EngineRecord(**{**values, **changes})


def test_an_engine_of_each_form_is_built_with_its_record(exported: Path, tmp_path: Path) -> None:
    folder = exported / "fused"
    for source in ("model.onnx", "model.int8-tensorrt.onnx"):
        path = tmp_path / f"{source}.engine"
        built = write_engine(folder / source, path, ADA)
        assert built.compute_capabilities == ["8.9"]
        assert built.source_sha256 == sha256_of(folder / source)
        assert built.source_sha256.encode() in path.read_bytes(), "the source's hash is inside the engine"
        assert json.loads(path.with_suffix(".json").read_text())["profile"] == {
            "min": 1,
            "opt": 256,
            "max": 256,
        }


@pytest.mark.slow
def test_an_engine_is_built_in_ten_seconds(exported: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    write_engine(exported / "fused" / "model.onnx", tmp_path / "model.engine", ADA)
    assert time.perf_counter() - start < 10


def test_what_cannot_be_built_is_refused_with_the_builders_reason(exported: Path, tmp_path: Path) -> None:
    folder = exported / "fused"
    path = tmp_path / "x.engine"
    with pytest.raises(CheckError, match=r"SM75|Turing"):  # no fp32 matrix product before Ampere
        write_engine(folder / "model.onnx", path, EngineOptions("tensorrt_rtx", ("7.5",)))
    with pytest.raises(CheckError, match=r"cannot read model\.int8\.onnx"):  # asymmetric activations
        write_engine(folder / "model.int8.onnx", path, ADA)
    with pytest.raises(UsageError, match=r"9\.0; known: .*8\.9"):
        write_engine(folder / "model.onnx", path, EngineOptions("tensorrt_rtx", ("9.0",)))
    with pytest.raises(UsageError, match="known: tensorrt, tensorrt_rtx"):
        write_engine(folder / "model.onnx", path, EngineOptions("tensort"))
    assert not path.exists()


def test_an_engine_for_another_version_or_gpu_is_refused_before_it_is_loaded() -> None:
    engine, ada = Engine(b"", record(), "fp32.engine", "run: ffl-engine B"), Gpu("Ada", (8, 9), "580.65.06")
    check_machine(engine, "1.7", ada)
    with pytest.raises(
        CheckError, match=r"built by tensorrt_rtx 1\.7, this machine has 1\.8.*run: ffl-engine B\.$"
    ):
        check_machine(engine, "1.8", ada)
    with pytest.raises(CheckError, match=r"compute capability 8\.9, this GPU has 9\.0"):
        check_machine(engine, "1.7", ada._replace(capability=(9, 0)))
    with pytest.raises(CheckError, match="no valid engine record"):
        _ = Variant("e", "tensorrt", "e.engine", "0", 1, Precision("fp32", "fp32")).engine


def test_an_fp32_engine_is_not_built_with_tf32(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorrt_rtx

    flags = []
    original = tensorrt_rtx.Builder.create_builder_config

    def watched(builder: object) -> object:
        flags.append(original(builder))
        return flags[-1]

    monkeypatch.setattr(tensorrt_rtx.Builder, "create_builder_config", watched)
    write_engine(exported / "branch0" / "model.onnx", tmp_path / "fp32.engine", ADA)
    assert not flags[0].get_flag(tensorrt_rtx.BuilderFlag.TF32)


def test_an_unsupported_type_is_refused_with_the_builders_reason(exported: Path, tmp_path: Path) -> None:
    """8-bit floats need Ada or newer; Ampere is refused, not silently given something else."""
    import onnx

    proto = onnx.load(exported / "branch0" / "model.onnx")
    convolution = next(node for node in proto.graph.node if node.op_type == "Conv")
    kind = onnx.TensorProto.FLOAT8E4M3FN
    scale = onnx.helper.make_tensor("fp8_scale", onnx.TensorProto.FLOAT, [], [0.1])
    zero = onnx.helper.make_tensor("fp8_zero", kind, [], [0.0])
    proto.graph.initializer.extend([scale, zero])
    index = list(proto.graph.node).index(convolution)
    source = convolution.input[0]
    quantise = onnx.helper.make_node(
        "QuantizeLinear", [source, "fp8_scale", "fp8_zero"], ["fp8"], name="fp8_quantise"
    )
    back = onnx.helper.make_node(
        "DequantizeLinear", ["fp8", "fp8_scale", "fp8_zero"], ["fp8_back"], name="fp8_dequantise"
    )
    convolution.input[0] = "fp8_back"
    proto.graph.node.insert(index, back)
    proto.graph.node.insert(index, quantise)
    path = tmp_path / "fp8.onnx"
    onnx.save(proto, path)
    write_engine(path, tmp_path / "ada.engine", ADA)
    with pytest.raises(
        CheckError, match=r"cannot build fp8\.onnx for compute capability 8\.0.*(FP8|8-bit|fp8)"
    ):
        write_engine(path, tmp_path / "ampere.engine", EngineOptions("tensorrt_rtx", ("8.0",)))


def test_the_real_builder_takes_a_profile_for_each_batch_size(exported: Path) -> None:
    source = exported / "branch0" / "model.onnx"
    made = build(source, EngineOptions("tensorrt_rtx", ("8.9", "12.0"), batches=(1, 8, 64)))
    assert made.record.profiles == [[1, 1, 1], [2, 8, 8], [9, 64, 64]]
    assert made.record.compute_capabilities == ["8.9", "12.0"]
    assert made.timings is None, "TensorRT-RTX times nothing when it builds"


@pytest.mark.gpu
def test_an_engine_gives_the_golden_logits_on_a_gpu(exported: Path, tmp_path: Path) -> None:
    try:
        name = this_gpu().compute_capability
    except UsageError as error:
        pytest.skip(str(error))
    path = tmp_path / "fp32.engine"
    try:
        built = write_engine(
            exported / "branch0" / "model.onnx", path, EngineOptions("tensorrt_rtx", (name,))
        )
    except UsageError as error:
        pytest.skip(f"TensorRT-RTX does not run on this GPU: {error}")
    details = Details(engine=msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=EngineRecord))
    assert built == details.engine
    variant = Variant(
        "fp32-engine", "tensorrt", path.name, sha256_of(path), 1, Precision("fp32", "fp32"), details=details
    )
    session = TensorRtSession(bundled(path, built), variant)
    golden = load_bundle(exported / "branch0").golden()
    for batch in (1, 7, len(golden.images)):
        outputs = session.run(golden.images[:batch])
        assert (
            np.abs(outputs.logits - golden.logits[:batch]).max()
            <= PARITY_GATES["fp32"].scaled_max_diff * golden.logits.std()
        )
    session.close()
