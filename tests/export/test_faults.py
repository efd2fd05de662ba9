"""Each way in which an export can be wrong is put in on purpose,
and must be caught by the gate that is there for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.check.localize import first_difference
from export.cli import main
from export.write.onnx_graph import DeployedModel, GraphOptions, write_onnx
from ffl_deploy.command import run_command
from ffl_deploy.errors import CheckError
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.networks.targets import build_target
from ffl_deploy.parity import PARITY_GATES, compare
from ffl_deploy.run_directory import Run
from ffl_deploy.runtime import import_onnxruntime

Fault = Callable[[Path], None]


@pytest.fixture(scope="module")
def model(colour_run: Run) -> DeployedModel:
    return DeployedModel(
        build_target(load_network(colour_run).network, "fused"), colour_run.mean, colour_run.std
    ).eval()


@pytest.fixture(scope="module")
def clean(colour_run: Run, model: DeployedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fused target of the colour run as a file without a fault."""
    path = tmp_path_factory.mktemp("clean") / "model.onnx"
    write_onnx(
        model, path, colour_run.preprocessing.height, colour_run.preprocessing.width, GraphOptions(), {}
    )
    return path


@pytest.fixture
def export_with(
    colour_run: Run,
    clean: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[Fault], tuple[int, str]]:
    """-> run ffl-export with a fault put into the file that it writes; (exit code,
    what it said on stderr)."""

    def export(fault: Fault) -> tuple[int, str]:
        def write(_model: DeployedModel, path: Path, *_: object) -> None:
            shutil.copy(clean, path)
            fault(path)

        monkeypatch.setattr("export.formats.write_onnx", write)
        monkeypatch.setattr("export.temperature.fit_temperature", lambda *_: 1.0)  # the clean file has none
        code = run_command(
            main, [str(colour_run.folder), "--target", "fused", "--out", str(tmp_path / "out")]
        )
        left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert (code == 0) == bool(left), "a failed gate leaves no file behind, a good export does"
        return code, capsys.readouterr().err

    return export


def edit(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, path)


def weight(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def replace(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def constant_of(proto: onnx.ModelProto, kind: str) -> str:
    """-> name of the constant of the first node of this kind; normalisation comes first in the graph."""
    return next(node for node in proto.graph.node if node.op_type == kind).input[1]


def swapped_channels(proto: onnx.ModelProto) -> None:
    """The graph reads BGR: a reversed first convolution,
    mean and std do to RGB pixels what RGB layers do to BGR ones."""
    for kind in ("Conv", "Sub", "Div"):  # weights [o, 3, h, w]; mean and std, repeated along a row: [w, 3]
        tensor = weight(proto, constant_of(proto, kind))
        replace(tensor, np.flip(numpy_helper.to_array(tensor), axis=1))


def wrong_mean(proto: onnx.ModelProto) -> None:
    mean = weight(proto, constant_of(proto, "Sub"))
    replace(mean, numpy_helper.to_array(mean) + 1)


def frozen_batch(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def effect(proto: onnx.ModelProto, images: np.ndarray, logits: np.ndarray) -> float:
    """-> how far the file's logits are from `logits`, in the unit of the gate."""
    session = import_onnxruntime().InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return compare(logits, session.run(["logits"], {"images": images})[0]).scaled_max_diff


@pytest.fixture
def perturbed_weight(colour_run: Run) -> Callable[[onnx.ModelProto], None]:
    """One weight of one convolution is changed by as much as it takes to pass the gate tenfold,
    whatever training gave."""
    images, _, logits = colour_run.reference("best", "fused")

    def perturb(proto: onnx.ModelProto) -> None:
        tensor = next(
            tensor for tensor in proto.graph.initializer if "branches.1.0.1.conv2.weight" in tensor.name
        )
        values = numpy_helper.to_array(tensor)
        largest = np.argsort(-np.abs(values), axis=None)[:16]  # of channels that training used
        for amount in 0.05 * 2.0 ** np.arange(8):
            for place in largest:
                changed = values.copy()
                changed.flat[place] += amount
                replace(tensor, changed)
                if effect(proto, images, logits) > 10 * PARITY_GATES["fp32"].scaled_max_diff:
                    return
        pytest.fail("no weight of this convolution matters")

    return perturb


def nan_weight(proto: onnx.ModelProto) -> None:
    tensor = weight(proto, "target.fusion.classifier.bias")
    replace(tensor, np.array([0, np.nan, 0], np.float32))


def test_a_clean_file_passes(export_with: Callable[[Fault], tuple[int, str]]) -> None:
    assert export_with(lambda path: None) == (0, "")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (swapped_channels, ["max logit difference", "the first layer that differs is normalise"]),
        (wrong_mean, ["max logit difference", "the first layer that differs is normalise"]),
        (frozen_batch, ["froze the batch", "to 2"]),
        (nan_weight, ["NaN or infinite logits"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_faults_in_the_graph_are_caught_and_located(
    export_with: Callable[[Fault], tuple[int, str]], fault: Callable[[onnx.ModelProto], None], said: list[str]
) -> None:
    code, error = export_with(lambda path: edit(path, fault))
    assert code == 1
    assert "Traceback" not in error
    for part in said:
        assert part in error, error


def test_a_single_changed_weight_is_caught_and_located(
    export_with: Callable[[Fault], tuple[int, str]], perturbed_weight: Callable[[onnx.ModelProto], None]
) -> None:
    code, error = export_with(lambda path: edit(path, perturbed_weight))
    assert code == 1
    for part in ("max logit difference", "target.branches.1.0.1"):
        assert part in error, error


def test_a_mismatch_is_located_in_one_pass_over_few_images(
    clean: Path, model: DeployedModel, colour_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds depend on the machine; what costs them is the number of sessions and of runs."""
    ort, calls = import_onnxruntime(), []
    opened = ort.InferenceSession

    def counted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        return opened(*arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", counted)
    first_difference(clean, model, colour_run.reference("best", "fused")[0][:8])
    assert len(calls) == 1


def test_a_truncated_file_is_caught(export_with: Callable[[Fault], tuple[int, str]]) -> None:
    code, error = export_with(lambda path: os.truncate(path, path.stat().st_size // 2))
    assert code == 1
    assert "model.onnx" in error


def test_a_batch_frozen_inside_the_graph_is_caught_by_the_batch_sizes(
    export_with: Callable[[Fault], tuple[int, str]],
) -> None:
    """The declared shape is dynamic, but a reshape inside holds the traced batch of two:
    only other batches show it."""

    def fault(proto: onnx.ModelProto) -> None:
        logits = next(node for node in proto.graph.node if "logits" in node.output)
        logits.output[0] = "flat"
        proto.graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), "frozen_shape"))
        index = list(proto.graph.node).index(logits)
        proto.graph.node.insert(
            index + 1, onnx.helper.make_node("Reshape", ["flat", "frozen_shape"], ["logits"], name="frozen")
        )

    code, error = export_with(lambda path: edit(path, fault))
    assert code == 1
    assert "batch of 1" in error


def test_batch_normalisation_in_training_mode_is_refused_and_would_be_caught(
    colour_run: Run, model: DeployedModel, export_with: Callable[[Fault], tuple[int, str]], tmp_path: Path
) -> None:
    bad = DeployedModel(
        build_target(load_network(colour_run).network, "fused"), colour_run.mean, colour_run.std
    ).eval()
    bad.target.fusion.bn1.train()
    path = tmp_path / "bad.onnx"
    with pytest.raises(CheckError, match=r"target\.fusion\.bn1 is in training mode"):
        write_onnx(bad, path, 8, 8, GraphOptions(), {})
    assert not path.exists()

    class TrainingNorm(torch.nn.Module):
        """What BatchNorm computes in training mode, which the check on .training cannot see."""

        def __init__(self, norm: torch.nn.BatchNorm2d) -> None:
            super().__init__()
            self.weight, self.bias = norm.weight, norm.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
            scaled = (x - mean) / torch.sqrt(variance + 1e-5)
            return scaled * self.weight[:, None, None] + self.bias[:, None, None]

    bad.target.fusion.bn1 = TrainingNorm(bad.target.fusion.bn1).eval()
    write_onnx(bad, path, colour_run.preprocessing.height, colour_run.preprocessing.width, GraphOptions(), {})
    code, error = export_with(lambda written: shutil.copy(path, written) and None)
    assert code == 1
    assert "target.fusion.bn1" in error


def test_wrong_statistics_in_the_run_are_not_hidden_by_both_sides_sharing_them(
    colour_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch and the file agree on a wrong mean; training's stored logits do not."""
    copy = tmp_path / "run"
    shutil.copytree(colour_run.folder, copy)
    text = (copy / "config.json").read_text()
    first = f"{colour_run.mean[0]}"
    assert text.count(first) == 1
    (copy / "config.json").write_text(text.replace(first, f"{colour_run.mean[0] + 5}"))
    assert run_command(main, [str(copy), "--target", "branch0", "--out", str(tmp_path / "out")]) == 1
    assert "logits that training stored" in capsys.readouterr().err
    assert not (tmp_path / "out" / "branch0").exists()


def test_agreeing_layers_are_said_to_agree(model: DeployedModel, clean: Path, colour_run: Run) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    sentence = first_difference(clean, model, images)
    assert sentence.startswith("all ")
    assert int(sentence.split()[1]) > 40, (
        "normalisation, 27 convolutions with their BatchNorm, 13 blocks, fusion, classifier"
    )
