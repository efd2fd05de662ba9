"""The repository is parsed by Triton's own protobuf and compared with the graphs that it is to serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from export.publish.triton import write_repository
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.errors import UsageError

TYPES = {"TYPE_UINT8": onnx.TensorProto.UINT8, "TYPE_FP32": onnx.TensorProto.FLOAT}


def test_configurations_describe_the_graphs(exported: Path, tmp_path: Path) -> None:
    model_config = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="Triton's protobuf is not installed"
    )
    from google.protobuf import text_format

    bundle = load_bundle(exported / "fused")
    models = write_repository(bundle, tmp_path)
    assert [model.name for model in models] == ["fused", "fused-int8", "fused-int8-tensorrt"]
    for model in models:
        config = text_format.Parse((model / "config.pbtxt").read_text(), model_config.ModelConfig())
        graph = onnx.load(model / "1" / "model.onnx").graph
        assert config.name == model.name
        assert config.max_batch_size == 64
        for described, tensors in ((config.input, graph.input), (config.output, graph.output)):
            assert [entry.name for entry in described] == [tensor.name for tensor in tensors]
            for entry, tensor in zip(described, tensors, strict=True):
                assert TYPES[model_config.DataType.Name(entry.data_type)] == tensor.type.tensor_type.elem_type
                dims = [dim.dim_value or -1 for dim in tensor.type.tensor_type.shape.dim]
                assert dims[0] == -1, "the batch is dynamic and not part of Triton's dims"
                assert list(entry.dims) == dims[1:]
        assert config.output[1].label_filename == "labels.txt"
        assert (model / "labels.txt").read_text().split() == bundle.classes
        assert list(config.dynamic_batching.preferred_batch_size) == [8, 32, 64]
        assert config.version_policy.latest.num_versions == 2


def test_a_new_export_becomes_a_new_version_and_the_same_one_does_not(exported: Path, tmp_path: Path) -> None:
    bundle = load_bundle(exported / "branch0")
    (model,) = write_repository(bundle, tmp_path)
    write_repository(bundle, tmp_path)
    assert [path.name for path in model.iterdir() if path.is_dir()] == ["1"]
    (model / "1" / "model.onnx").write_bytes(b"an older model")
    write_repository(bundle, tmp_path)
    assert sorted(path.name for path in model.iterdir() if path.is_dir()) == ["1", "2"]
    assert (model / "2" / "model.onnx").read_bytes() == (bundle.folder / "model.onnx").read_bytes()


def test_other_classes_do_not_share_labels_with_an_older_version(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    """labels.txt is one for all versions, and two of them are served."""
    (model,) = write_repository(
        make_bundle(tmp_path / "a", classes=("cat", "dog", "frog")), tmp_path / "models"
    )
    write_repository(make_bundle(tmp_path / "b", classes=("frog", "dog", "cat"), seed=1), tmp_path / "models")
    assert [path.name for path in model.iterdir() if path.is_dir()] == ["2"]
    assert (model / "labels.txt").read_text().split() == ["frog", "dog", "cat"]


def test_a_model_that_was_not_written_here_is_left_alone(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    foreign = tmp_path / "models" / bundle.manifest.target
    (foreign / "1").mkdir(parents=True)
    (foreign / "1" / "model.pt").write_text("years of work")
    (foreign / "config.pbtxt").write_text('backend: "pytorch"\n')
    with pytest.raises(UsageError, match="was not written here; move it away"):
        write_repository(bundle, tmp_path / "models")
    assert (foreign / "1" / "model.pt").read_text() == "years of work"
