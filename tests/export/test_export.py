"""What the command writes: self-contained, reproducible graphs that give training's logits,
and bundles that say so."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from PIL import Image

from export.check.evaluation import Reference, class_balanced
from export.check.gates import check_golden
from export.check.localize import first_difference
from export.cli import main
from export.computed import computed_precision, float_operators, operator_histogram
from export.golden import golden_samples, read_golden
from export.publish.side_by_side import MAX_ROUNDS, MIN_ROUNDS
from export.write.half import write_half
from export.write.onnx_graph import SCOPES, DeployedModel, GraphOptions, write_onnx
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.bundle_checks import verify
from ffl_deploy.command import run_command
from ffl_deploy.errors import CheckError
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.networks.targets import build_target
from ffl_deploy.parity import PARITY_GATES, compare, judge
from ffl_deploy.run_directory import Run
from ffl_deploy.runtime import OnnxRuntimeSession


@pytest.fixture(scope="module")
def model(digits_run: Run, exported: Path) -> DeployedModel:
    """What bundle `fused` was exported from, in PyTorch."""
    temperature = load_bundle(exported / "fused").manifest.calibration.temperature
    target = build_target(load_network(digits_run).network, "fused")
    return DeployedModel(target, digits_run.mean, digits_run.std, temperature, ["cam", "embedding"]).eval()


def test_the_saved_file_gives_trainings_own_logits(digits_run: Run, exported: Path) -> None:
    for target in ("fused", "branch0"):
        images, _, logits = digits_run.reference("best", target)
        outputs = load_bundle(exported / target).session().run(images)
        assert np.abs(outputs.logits - logits).max() <= 1e-4 * logits.std()
        assert (outputs.logits.argmax(1) == logits.argmax(1)).all()


def test_the_graph_is_self_contained_and_carries_no_paths(exported: Path) -> None:
    path = exported / "fused" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path)
    assert [path.name for path in (exported / "fused").glob("*.data")] == []
    (images,) = proto.graph.input
    dims = images.type.tensor_type.shape.dim
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 8, 8, 3]
    assert [output.name for output in proto.graph.output] == ["logits", "probabilities", "cam", "embedding"]
    keys = {entry.key for node in proto.graph.node for entry in node.metadata_props}
    assert keys == {SCOPES}
    content = path.read_bytes()
    for word in (b".py", str(Path.cwd()).encode(), b"site-packages"):
        assert word not in content
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}


def test_a_target_holds_no_other_branch(exported: Path) -> None:
    names = [tensor.name for tensor in onnx.load(exported / "branch0" / "model.onnx").graph.initializer]
    assert not [name for name in names if "fusion" in name or "branches.1" in name]
    fused, branch = (load_bundle(exported / name).manifest for name in ("fused", "branch0"))
    assert branch.source.parameters < fused.source.parameters
    assert branch.variants[0].bytes < fused.variants[0].bytes


def test_the_same_checkpoint_gives_the_same_bytes_in_another_process(
    digits_run: Run, exported: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "export.cli",
        str(digits_run.folder),
        "--target",
        "branch0",
        "--out",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("model.onnx", "golden.npz"):
        assert (tmp_path / "branch0" / name).read_bytes() == (exported / "branch0" / name).read_bytes()


def test_the_same_file_gives_the_same_other_forms(exported: Path, digits_run: Run, tmp_path: Path) -> None:
    from export.write.int8_choice import Held, Judges
    from export.write.quantize import quantize

    images, _, logits = digits_run.reference("best", "fused")
    written = []
    for turn in ("first", "second"):
        folder = tmp_path / turn
        folder.mkdir()
        judges = Judges(Held(images[64:128], logits[64:128]), (Held(images[:64], logits[:64]),))
        quantize(exported / "fused" / "model.onnx", folder, images[:64], judges)
        for precision in ("fp16", "bf16"):
            write_half(exported / "fused" / "model.onnx", folder / f"model.{precision}.onnx", precision)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(written[0]) == 4
    assert written[0] == written[1]


def test_every_bundle_verifies_and_tells_what_was_measured(exported: Path) -> None:
    bundle = load_bundle(exported / "fused")
    lines = list(verify(bundle))
    assert any("int8 gate passed" in line for line in lines)
    manifest = bundle.manifest
    assert [variant.name for variant in manifest.variants] == ["fp32", "int8", "int8-tensorrt"]
    assert bundle.variant().name == "fp32"
    assert set(manifest.variants[0].parity.batches) == {"1", "2", "7", "64", "260"}, "four of them made up"
    assert manifest.variants[0].accuracy.verdict.status == "passed"
    assert (
        manifest.variants[1].accuracy.verdict.note == f"inconclusive (n = {manifest.variants[1].accuracy.n})"
    )
    assert manifest.golden.count == 64
    assert manifest.calibration.temperature != 1
    card = (exported / "fused" / "README.md").read_text()
    assert f"{100 * manifest.variants[0].accuracy.value:.2f} %" in card
    assert manifest.source.checkpoint_sha256 in card


def test_the_temperature_is_in_the_probabilities_and_not_in_the_logits(exported: Path) -> None:
    bundle = load_bundle(exported / "fused")
    outputs = bundle.session().run(bundle.golden().images)
    scaled = np.exp(outputs.logits / bundle.manifest.calibration.temperature)
    assert outputs.probabilities == pytest.approx(scaled / scaled.sum(axis=1, keepdims=True), abs=1e-5)


def test_the_class_activation_map_and_the_embedding_lead_to_the_logits(
    exported: Path, model: DeployedModel
) -> None:
    """Zhou et al. 2016: pooling the map of a class and adding its bias is the class's logit."""
    bundle = load_bundle(exported / "fused")
    outputs = bundle.session().run(bundle.golden().images)
    head = model.target.classifier
    bias, predicted = head.bias.numpy(), outputs.logits.argmax(axis=1)
    assert outputs.embedding @ head.weight.numpy().T + head.bias.numpy() == pytest.approx(
        outputs.logits, rel=1e-3, abs=1e-3
    )
    assert outputs.cam.mean(axis=(1, 2)) + bias[predicted] == pytest.approx(
        outputs.logits.max(axis=1), rel=1e-4, abs=1e-4
    )


def test_int8_leaves_no_convolution_in_float_unless_it_was_chosen(exported: Path) -> None:
    bundle = load_bundle(exported / "fused")
    cpu, tensorrt = (bundle.variant(name) for name in ("int8", "int8-tensorrt"))
    histogram = operator_histogram(bundle.folder / cpu.file)
    chosen = cpu.details.quantisation.chosen
    convolutions = {
        node.name for node in onnx.load(bundle.folder / cpu.file).graph.node if node.op_type == "Conv"
    }
    # the others are classifiers, and what follows a convolution
    kept = len(convolutions & set(chosen.float_layers))
    assert float_operators(histogram) == kept
    assert histogram["QLinearConv"] == 30 - kept, "14 shared, 7 in each branch, 2 of fusion"
    assert cpu.precision == msgspec.convert({"stored": "int8", "computed": "int8"}, type(cpu.precision))
    assert {candidate.method for candidate in cpu.details.quantisation.candidates} == {
        "minmax",
        "percentile",
        "entropy",
    }
    assert chosen.mean_kl == min(one.mean_kl for one in cpu.details.quantisation.candidates if one.golden)
    zero_points = quantisation_zero_points(onnx.load(bundle.folder / tensorrt.file))
    assert set(zero_points) == {("int8", 0)}, "TensorRT takes symmetric int8 only"
    assert any(kind == "uint8" for kind, _ in quantisation_zero_points(onnx.load(bundle.folder / cpu.file)))


def quantisation_zero_points(proto: onnx.ModelProto) -> set[tuple[str, int]]:
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    zeros = [values[node.input[2]] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    return {(str(zero.dtype), int(zero)) for zero in zeros}


def test_residual_adds_of_the_tensorrt_form_are_quantised_on_both_sides(exported: Path) -> None:
    proto = onnx.load(exported / "fused" / "model.int8-tensorrt.onnx")
    makers = {name: node.op_type for node in proto.graph.node for name in node.output}
    adds = [node for node in proto.graph.node if node.op_type == "Add"]
    assert len(adds) == 12, "residual blocks: 6 shared, 3 in each branch"
    assert {makers[name] for node in adds for name in node.input} == {"DequantizeLinear"}


def test_fp16_stores_sixteen_bits_and_onnx_runtime_computes_in_thirty_two(
    exported: Path, digits_run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "model.fp16.onnx"
    write_half(exported / "fused" / "model.onnx", path, "fp16")
    assert path.stat().st_size < 0.6 * (exported / "fused" / "model.onnx").stat().st_size
    assert computed_precision(path)[0] == "fp32"
    images, _, logits = digits_run.reference("best", "fused")
    outputs = OnnxRuntimeSession(path, "fp16").run(images)
    assert judge({"256": compare(logits, outputs.logits)}, PARITY_GATES["fp16"]).status == "passed"
    assert outputs.cam is not None
    assert outputs.embedding.dtype == np.float32


@pytest.mark.parametrize("target", ["fused", "branch0"])
def test_second_opinions_agree(
    exported: Path, target: str, record_property: Callable[[str, object], None]
) -> None:
    """onnx's reference evaluator and OpenVINO give what ONNX Runtime gives, within fp32 rounding."""
    from onnx.reference import ReferenceEvaluator

    from ffl_deploy.runtime.openvino_runtime import OpenVinoSession

    path = exported / target / "model.onnx"
    golden = load_bundle(exported / target).golden()
    images, logits = golden.images[:16], golden.logits[:16]
    reference = ReferenceEvaluator(str(path)).run(["logits"], {"images": images})[0]
    openvino = OpenVinoSession(path, "fp32")
    assert openvino.layer_precisions().keys() == {"fp32"}
    differences = {
        name: float(np.abs(values - logits).max() / logits.std())
        for name, values in {"onnx.reference": reference, "openvino": openvino.run(images).logits}.items()
    }
    for name, difference in differences.items():
        record_property(f"{target}: {name}", difference)  # shown with --junitxml
        print(f"{target}: {name} differs by {difference:.1e} of the logits' standard deviation")
    assert max(differences.values()) < 1e-4, differences


def test_bf16_is_verified_in_openvino(exported: Path, digits_run: Run, tmp_path: Path) -> None:
    from ffl_deploy.runtime.openvino_runtime import OpenVinoSession

    path = tmp_path / "model.bf16.onnx"
    write_half(exported / "branch0" / "model.onnx", path, "bf16")
    session = OpenVinoSession(path, "bf16", precision="bf16")
    if session.computed != "bf16":
        pytest.skip(f"this processor computes bf16 files in {session.computed}")
    images, _, logits = digits_run.reference("best", "branch0")
    assert (
        judge({"256": compare(logits, session.run(images).logits)}, PARITY_GATES["bf16"]).status == "passed"
    )


def test_bad_input_is_one_sentence(
    digits_run: Run, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(digits_run.folder, other)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace("resnet20", "resnet32"))
    no_reference, no_checkpoint = tmp_path / "no_reference", tmp_path / "no_checkpoint"
    shutil.copytree(digits_run.folder, no_reference)
    (no_reference / "eval_reference.npz").unlink()
    shutil.copytree(digits_run.folder, no_checkpoint)
    shutil.rmtree(no_checkpoint / "checkpoints")
    damaged, other_images, other_labels = (
        tmp_path / name for name in ("damaged", "other_images", "other_labels")
    )
    shutil.copytree(digits_run.folder, other_labels)
    shutil.copytree(digits_run.folder, damaged)
    os.truncate(damaged / "eval_reference.npz", 1000)
    shutil.copytree(digits_run.folder, other_images)
    with np.load(digits_run.folder / "eval_reference.npz") as arrays:
        np.savez(other_images / "eval_reference.npz", **{**arrays, "indices": arrays["indices"][::-1]})
        np.savez(other_labels / "eval_reference.npz", **{**arrays, "labels": (arrays["labels"] + 1) % 10})
    run = str(digits_run.folder)
    cases = [
        ([str(tmp_path / "nowhere")], 2, "no run directory"),
        ([run, "--target", "fusd"], 2, "Did you mean 'fused'"),
        ([run, "--checkpoint", "worst"], 2, "no checkpoint 'worst'"),
        ([str(no_reference)], 2, "no eval_reference.npz"),
        ([str(no_checkpoint)], 2, "no checkpoint 'best'"),
        ([str(damaged)], 1, "eval_reference.npz is damaged"),
        ([str(other_images)], 1, "not those that training evaluated"),
        ([str(other_labels)], 1, "labels of digits are not those that training evaluated"),
        ([str(other)], 1, "belongs to another architecture"),
        ([run, "--batch", "zero"], 2, "--batch zero"),
        ([run, "--opset", "3"], 2, "--opset 3"),
        ([run, "--cam", "--target", "ensemble"], 2, "--cam needs a target"),
        ([run, "--golden", str(tmp_path / "none")], 2, "--golden"),
        ([run, "--min-accuracy", "95"], 2, "0.95"),
        (["--report-only", "--out", str(tmp_path)], 2, "no bundles"),
    ]
    for arguments, expected, words in cases:
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        assert run_command(main, [*arguments, *out]) == expected, arguments
        error = capsys.readouterr().err
        assert words in error, arguments
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("out/**/*.*"))


@pytest.mark.slow
def test_a_static_batch_is_kept_and_padded(digits_run: Run, model: DeployedModel, tmp_path: Path) -> None:
    from ffl_deploy.runtime.session import FixedBatchSession

    path = tmp_path / "model.onnx"
    write_onnx(model, path, 8, 8, GraphOptions(opset=21, batch=4), {"ffl.target": "fused"})
    proto = onnx.load(path)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4
    assert proto.opset_import[0].version == 21
    images, _, logits = digits_run.reference("best", "fused")
    outputs = FixedBatchSession(OnnxRuntimeSession(path, "fp32"), 4).run(images[:6])
    assert outputs.logits == pytest.approx(logits[:6], abs=1e-4 * float(logits.std()))
    assert len(outputs.cam) == 6
    for count in (1, 8):  # the layer is looked for with however many images differ
        found = first_difference(path, model, images[:count], batch=4)
        assert re.match(r"all \d\d layers of the file, computed one by one", found), found


def test_golden_images_may_come_from_a_folder(digits_run: Run, model: DeployedModel, tmp_path: Path) -> None:
    """For runs whose own images may not be passed on."""
    images, _, logits = digits_run.reference("best", "fused")
    for index in range(3):
        Image.fromarray(images[index]).save(tmp_path / f"{index}.png")
    own = read_golden(tmp_path, digits_run)
    samples = golden_samples(model, Reference(images, np.zeros(256, np.int64), logits), own, digits_run)
    np.testing.assert_array_equal(samples.images, images[:3])
    assert list(own) == ["0.png", "1.png", "2.png"]
    assert samples.labels.tolist() == [-1, -1, -1]
    assert samples.logits == pytest.approx(logits[:3], abs=1e-4 * float(logits.std()))


def test_variants_are_held_to_the_golden_samples_as_ffl_verify_will(
    tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    """That they passed on the reference images says nothing about a user's own;
    the image that breaks the gate is named."""
    bundle = make_bundle(tmp_path / "bundle", golden_count=4)
    golden, session = bundle.golden(), bundle.session()
    check_golden(session, golden, (), "int8", bundle.temperature)
    golden.logits[0] *= 1.5  # the largest difference, in the same direction: int8 allows it
    golden.logits[2] *= -2  # the other direction
    with pytest.raises(CheckError, match=r"smallest cosine .* take c\.png out of the --golden folder"):
        check_golden(session, golden, ("a.png", "b.png", "c.png", "d.png"), "int8", bundle.temperature)
    with pytest.raises(CheckError, match=r"variant fp32 .* would refuse it; try another --precision"):
        check_golden(session, golden, (), "int8", bundle.temperature)


def test_class_balanced_takes_every_class_and_follows_the_seed() -> None:
    labels = np.array([0] * 50 + [1] * 5 + [2] * 20)
    rows = class_balanced(labels, 21)
    assert np.bincount(labels[rows]).tolist() == [8, 5, 8]
    assert (np.diff(rows) > 0).all()
    assert rows.tolist() == class_balanced(labels, 21).tolist() != class_balanced(labels, 21, seed=1).tolist()


def test_the_report_recommends_under_limits(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundles"
    shutil.copytree(exported, out)
    assert run_command(main, ["--report-only", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert {(row["target"], row["variant"]) for row in report["rows"]} >= {
        ("fused", "fp32"),
        ("fused", "int8"),
        ("branch0", "fp32"),
    }
    assert report["recommendation"]["artefact"] in (out / "report.md").read_text()
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    for row in report["rows"]:
        if row["p50_ms"] is not None:
            assert row["p50_low_ms"] <= row["p50_ms"] <= row["p50_high_ms"]
    assert {len(timing["windows_ms"]) for timing in report["timings"]} <= set(
        range(MIN_ROUNDS, MAX_ROUNDS + 1)
    )
    assert len({len(timing["windows_ms"]) for timing in report["timings"]}) == 1  # in the same rounds
    smallest = min(row["bytes"] for row in report["rows"] if row["p50_ms"])
    assert run_command(main, ["--report-only", "--out", str(out), "--max-bytes", str(smallest)]) == 0
    again = json.loads((out / "report.json").read_text())
    assert again["timings"] == report["timings"], "other limits are no reason to measure anew"
    chosen = again["recommendation"]["artefact"]
    assert next(r["bytes"] for r in report["rows"] if f"{r['target']}/{r['variant']}" == chosen) == smallest
    capsys.readouterr()
    assert run_command(main, ["--report-only", "--out", str(out), "--max-bytes", "10"]) == 1
    assert "no artefact keeps the limits" in capsys.readouterr().err


def test_no_torch_is_needed_to_verify(exported: Path) -> None:
    code = (
        "import sys; from ffl_deploy.verify import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'onnx', 'scipy', 'sklearn', 'gradio') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(exported / "fused")], check=True, capture_output=True, text=True
    )
    assert run.stdout.splitlines()[-1] == "[]"
