"""A run that was trained for int8: export writes its scales, and the file computes what training computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.check.evaluation import Evaluation
from export.cli import main
from export.write.onnx_graph import Normalize
from ffl_deploy.bundle import load_bundle
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.networks.quantization import QuantizedNetwork
from ffl_deploy.networks.targets import network_path, target_names
from ffl_deploy.run_directory import Run, load_run

TARGETS = ("fused", "ensemble")


@pytest.fixture(scope="module")
def trained(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    from train.run import main as train

    folder, out = tmp_path_factory.mktemp("runs") / "int8", tmp_path_factory.mktemp("bundles")
    assert (
        train(["--quantize-aware", str(digits_run.folder), "--epochs", "1", "--quiet", "--out", str(folder)])
        == 0
    )
    targets = [flag for target in TARGETS for flag in ("--target", target)]
    assert main([str(folder), *targets, "--precision", "int8", "--out", str(out)]) == 0
    return load_run(folder), out


def quantized_network(run: Run) -> QuantizedNetwork:
    quantized = Evaluation(run, load_network(run), "best", ["fused"]).quantized
    assert quantized is not None
    return quantized


@pytest.mark.parametrize("target", TARGETS)
def test_the_file_computes_what_training_computed(trained: tuple[Run, Path], target: str) -> None:
    run, out = trained
    evaluation = Evaluation(run, load_network(run), "best", [target])
    images = evaluation.data.test.read(slice(0, 200))
    with torch.no_grad():
        outputs = quantized_network(run)(Normalize(run.mean, run.std)(torch.from_numpy(images))).classifiers()
        plain = evaluation.loaded.network(
            Normalize(run.mean, run.std)(torch.from_numpy(images))
        ).classifiers()
    expected, exact = outputs[target].numpy(), plain[target].numpy()
    found = load_bundle(out / target).session("int8").run(images).logits
    difference = np.abs(found - expected).max(axis=1) / exact.std()
    # Sums in another order may round an activation to the next level in some image, seldom; rounding as such
    # is a hundred times as far from the network without it.
    assert np.median(difference) < 1e-4
    assert np.mean(difference < 1e-3) > 0.95
    assert np.median(np.abs(exact - expected).max(axis=1) / exact.std()) > 5e-3


@pytest.mark.parametrize("target", TARGETS)
def test_its_scales_are_training_s(trained: tuple[Run, Path], target: str) -> None:
    run, out = trained
    graph = onnx.load(out / target / "model.int8.onnx").graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantized = quantized_network(run)
    steps, grids = quantized.weight_scales(), set(quantized.parameters_by_name().values())
    weights = activations = 0
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            assert (values[node.input[1]].item(), values[node.input[2]].item()) in grids, node.name
            activations += 1
        elif node.op_type == "DequantizeLinear" and node.input[0].endswith(".weight_quantized"):
            path = network_path(target, node.input[0].removesuffix(".weight_quantized"))
            assert np.array_equal(values[node.input[1]], steps[path].numpy())
            weights += 1
    assert weights == sum(node.op_type in ("Conv", "Gemm") for node in graph.node)
    assert activations > weights


def test_the_fp32_file_has_the_very_weights(trained: tuple[Run, Path]) -> None:
    _, out = trained
    whole = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(out / "fused/model.int8.onnx").graph.initializer
    }
    plain = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(out / "fused/model.onnx").graph.initializer
    }
    layers = [name for name in plain if name.endswith(".weight")]
    assert len(layers) > 20
    for name in layers:
        scale = whole[f"{name}_scale"].reshape(-1, *[1] * (plain[name].ndim - 1))
        assert np.allclose(
            plain[name], whole[f"{name}_quantized"] * scale, rtol=1e-4, atol=1e-6 * np.abs(plain[name]).max()
        )


def test_a_run_without_it_is_calibrated(digits_run: Run) -> None:
    assert Evaluation(digits_run, load_network(digits_run), "best", ["fused"]).quantized is None


def test_every_target_s_names_lead_to_the_network(digits_run: Run) -> None:
    network = load_network(digits_run).network
    assert network_path("branch1", "target.branch.0.0.conv1") == "branches.1.0.0.conv1"
    assert network_path("branch1", "target.classifier") == "heads.1"
    assert network_path("fused", "target.fusion.classifier") == "fusion.classifier"
    for target in target_names(network):
        assert network.get_submodule(network_path(target, "target.trunk")) is network.trunk


def test_the_manifest_says_whose_scales_they_are(trained: tuple[Run, Path], exported: Path) -> None:
    def method(bundle: Path) -> str:
        record = load_bundle(bundle).variant("int8").details.quantisation
        assert record is not None
        return record.chosen.method

    assert method(trained[1] / "fused") == "trained"
    assert method(exported / "fused") in ("minmax", "percentile", "entropy")
