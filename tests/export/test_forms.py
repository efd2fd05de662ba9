"""The flags of ffl-export together, as a user gives them: other precisions, runtimes, engines, Triton,
Space, signature."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.check.evaluation import Reference
from export.check.gates import EXTRA_GATES, HeldOut, check_extras, judge_answers
from export.check.localize import first_difference, layer_differences
from export.cli import main
from export.write.graph_parts import tail
from export.write.onnx_graph import DeployedModel
from ffl_deploy.bundle import load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import ArraySplit
from ffl_deploy.errors import CheckError
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.networks.targets import build_target
from ffl_deploy.run_directory import Run
from ffl_deploy.runtime.session import Outputs, Session
from ffl_deploy.verify import main as verify_main

REASON = "is not installed"


@pytest.fixture(scope="module")
def keys(signing_keys: Callable[[str], tuple[Path, Path]]) -> tuple[Path, Path]:
    """A private and a public key."""
    return signing_keys("forms")


@pytest.fixture(scope="module")
def forms(digits_run: Run, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """branch0 in every form that this machine can make, by one command; -> the folder with bundles/,
    triton/ and space/."""
    pytest.importorskip("openvino", reason=f"OpenVINO {REASON}")
    pytest.importorskip("tensorrt_rtx", reason=f"tensorrt_rtx {REASON}")
    root = tmp_path_factory.mktemp("forms")
    flags = [
        "--target",
        "branch0",
        "--precision",
        "fp16",
        "--precision",
        "bf16",
        "--runtime",
        "openvino",
        "--opset",
        "22",
    ]
    flags += [
        "--tensorrt",
        "--compute-capability",
        "8.9",
        "--triton",
        str(root / "triton"),
        "--space",
        str(root / "space"),
        "--space-sdk",
        "gradio",
    ]
    flags += ["--sign", str(keys[0]), "--min-accuracy", "0.5", "--out", str(root / "bundles")]
    assert main([str(digits_run.folder), *flags]) == 0
    return root


def test_every_form_is_in_the_bundle_with_what_it_computes(forms: Path) -> None:
    bundle = load_bundle(forms / "bundles" / "branch0")
    variants = {variant.name: variant for variant in bundle.manifest.variants}
    assert list(variants) == [
        "fp32",
        "fp32-openvino",
        "fp32-engine",
        "fp16",
        "fp16-openvino",
        "fp16-engine",
        "bf16",
        "bf16-engine",
    ]
    assert (variants["fp32-openvino"].precision.stored, variants["fp32-openvino"].precision.computed) == (
        "fp32",
        "fp32",
    )
    assert variants["fp16"].precision.computed == "fp32", "ONNX Runtime's CPU has no fp16 convolution"
    assert variants["bf16"].runtime == "openvino"
    for name in ("fp32", "fp32-openvino", "fp16", "fp16-openvino", "bf16"):
        assert variants[name].parity.verdict.status == "passed"
        assert variants[name].latency.p50_ms > 0
    for file in bundle.folder.glob("*.onnx"):
        proto = onnx.load(file)
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 22)], file.name
        assert proto.ir_version == 10, "the lowest that opset 22 allows"
    report = json.loads((forms / "bundles" / "report.json").read_text())
    assert len(report["rows"]) == len(variants)
    assert not [
        row for row in report["rows"] if row["variant"].endswith("-engine") and row["p50_ms"] is not None
    ]


def test_the_bundle_verifies_and_says_what_could_not_run(
    forms: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(forms / "bundles" / "branch0"), "--public-key", str(keys[1])]
    assert run_command(verify_main, arguments) == 0
    said = capsys.readouterr().out
    assert "signed by the owner" in said
    assert "bf16 on openvino" in said
    assert "bf16 gate passed" in said
    assert run_command(verify_main, [str(forms / "nowhere"), *arguments[1:]]) == 2


def test_a_changed_engine_is_refused_before_tensorrt_sees_it(
    forms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(forms / "bundles" / "branch0", tmp_path / "branch0")
    engine = bundle / "engines" / "fp32.engine"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    monkeypatch.setattr(
        "ffl_deploy.runtime.tensorrt_runtime.import_tensorrt", lambda *_: pytest.fail("it was opened")
    )
    with pytest.raises(CheckError, match=r"fp32\.engine was changed since export"):
        load_bundle(bundle).session("fp32-engine")
    assert run_command(verify_main, [str(bundle)]) == 1
    assert "was changed since export" in capsys.readouterr().err


def test_triton_gets_what_it_has_a_backend_for(forms: Path) -> None:
    """OpenVINO variants are the same files again, and no backend of Triton loads engines of TensorRT-RTX."""
    assert sorted(path.name for path in (forms / "triton").iterdir()) == ["branch0", "branch0-fp16"]
    assert (forms / "space" / "bundles" / "branch0" / "bundle.json").is_file()


@pytest.mark.slow
def test_a_static_batch_with_int8(digits_run: Run, tmp_path: Path) -> None:
    flags = [
        "--target",
        "branch0",
        "--batch",
        "3",
        "--precision",
        "int8",
        "--triton",
        str(tmp_path / "triton"),
    ]
    assert run_command(main, [str(digits_run.folder), *flags, "--out", str(tmp_path / "out")]) == 0
    assert run_command(main, ["--report-only", "--out", str(tmp_path / "out")]) == 0
    bundle = load_bundle(tmp_path / "out" / "branch0")
    dynamic = load_bundle(bundle.folder)
    assert dynamic.manifest.input.batch == 3
    golden = bundle.golden()
    outputs = bundle.session("int8").run(golden.images[:7])
    assert len(outputs.logits) == 7
    assert np.mean(outputs.logits.argmax(1) == golden.logits[:7].argmax(1)) >= 6 / 7
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert {row["multiply_adds"] for row in rows} == {rows[0]["multiply_adds"]}
    assert rows[0]["multiply_adds"] < 4e6, "of one image, not of three"
    parsed = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason=f"tritonclient {REASON}")
    from google.protobuf import text_format

    config = text_format.Parse(
        (tmp_path / "triton" / "branch0" / "config.pbtxt").read_text(), parsed.ModelConfig()
    )
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [3, 8, 8, 3]
    assert not config.HasField("dynamic_batching")


def test_a_fault_in_a_static_file_is_located(
    digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from export import formats

    write = formats.write_onnx

    def perturbed(model: object, path: Path, *arguments: object) -> None:
        write(model, path, *arguments)
        proto = onnx.load(path)
        tensor = next(one for one in proto.graph.initializer if "conv2.weight" in one.name)
        values = onnx.numpy_helper.to_array(tensor).copy()
        values += 0.1
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        onnx.save(proto, path)

    monkeypatch.setattr(formats, "write_onnx", perturbed)
    flags = ["--target", "branch0", "--batch", "3", "--out", str(tmp_path / "out")]
    assert run_command(main, [str(digits_run.folder), *flags]) == 1
    assert "the first layer that differs is target." in capsys.readouterr().err
    assert not (tmp_path / "out" / "branch0").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_fault_in_a_half_precision_file_is_located(
    digits_run: Run, forms: Path, tmp_path: Path, precision: str
) -> None:
    """Every layer is off by some rounding there; the one where the error grows most is named,
    and that is the faulty one."""
    bundle = load_bundle(forms / "bundles" / "branch0")
    proto = onnx.load(bundle.folder / f"model.{precision}.onnx")
    tensor = next(one for one in proto.graph.initializer if one.name == "target.branch.0.1.conv2.weight")
    bits = np.frombuffer(tensor.raw_data, np.uint16).copy()
    bits[: len(bits) // 4] ^= 0x8000  # the sign
    tensor.raw_data = bits.tobytes()
    broken = tmp_path / f"model.{precision}.onnx"
    onnx.save(proto, broken)
    target = build_target(load_network(digits_run).network, "branch0")
    model = DeployedModel(target, digits_run.mean, digits_run.std, bundle.temperature).eval()
    images = bundle.golden().images[:8]
    sentence = first_difference(broken, model, images, precision, bundle.folder / "model.onnx")
    assert sentence.startswith("the error grows most at target.")
    assert sentence.split()[5].startswith("target.branch.0.1"), sentence
    whole = layer_differences(
        bundle.folder / broken.name, model, images, bundle.folder / "model.onnx", precision
    )
    assert len(whole) > 20
    assert max(layer.rms for layer in whole) < 0.05


def test_int8_joins_classifiers_in_float(digits_run: Run, tmp_path: Path) -> None:
    """The ensemble's mean takes its branches' logits as they are;
    their classifiers are what may be kept in float."""
    flags = ["--target", "ensemble", "--precision", "int8", "--out", str(tmp_path)]
    assert run_command(main, [str(digits_run.folder), *flags]) == 0
    bundle = load_bundle(tmp_path / "ensemble")
    classifiers, between = tail(onnx.load(bundle.folder / "model.onnx"))
    assert [node.op_type for node in classifiers] == ["Gemm", "Gemm"]
    assert between, "what computes the mean"
    graph = onnx.load(bundle.folder / "model.int8.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    open_names, met = ["logits"], set()
    while open_names:
        node = makers.get(open_names.pop())
        if node is None or node.op_type == "Gemm":
            continue
        met.add(node.op_type)
        open_names += node.input
    assert not met & {"QuantizeLinear", "DequantizeLinear"}, met


class FixedAnswers(Session):
    """Gives stored outputs, in order."""

    runtime = variant = "fixed"

    def __init__(self, outputs: Outputs) -> None:
        self.outputs, self.at = outputs, 0

    def run(self, images: np.ndarray) -> Outputs:
        rows = slice(self.at, self.at + len(images))
        self.at += len(images)
        return Outputs._make(None if value is None else value[rows] for value in self.outputs)


def answers(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> images, labels, logits [count, 3] that are right."""
    labels = np.arange(count) % 3
    logits = np.eye(3, dtype=np.float32)[labels] * 4
    return np.zeros((count, 8, 8, 3), np.uint8), labels, logits


def test_one_image_without_a_finite_answer_fails_the_accuracy_gate() -> None:
    images, labels, logits = answers(6000)
    held = HeldOut(ArraySplit(images, labels), logits)
    probabilities = np.full_like(logits, 1 / 3)
    assert judge_answers(Outputs(logits, probabilities), held, "fp16").verdict.status == "passed"
    broken = logits.copy()
    broken[17] = np.nan
    record = judge_answers(Outputs(broken, probabilities), held, "fp16")
    assert record.verdict.failed
    assert str(record.verdict.findings[0]).startswith("number of images with NaN or infinite outputs is 1")
    assert np.isfinite(record.calibration_error)


def test_accuracy_that_is_lost_fails_the_export_gate() -> None:
    images, labels, logits = answers(6000)
    worse = logits.copy()
    worse[:60] = np.roll(worse[:60], 1, axis=1)  # one in a hundred
    held = HeldOut(ArraySplit(images, labels), logits)
    record = judge_answers(Outputs(worse, worse), held, "int8")
    assert record.verdict.failed
    assert record.difference.lost == 60


def test_ties_excuse_only_changes_of_tied_images() -> None:
    """fp32: an image may become right or wrong only where rounding decides its order of classes."""
    images, labels, logits = answers(600)
    logits[:3] = 0  # ties, which stay what they are
    lost = logits.copy()
    lost[3] = np.roll(lost[3], 1)
    held = HeldOut(ArraySplit(images, labels), logits)
    assert judge_answers(Outputs(lost, lost), held, "fp32").verdict.failed
    turned = logits.copy()
    turned[1, 0] -= 1e-6
    assert judge_answers(Outputs(turned, turned), held, "fp32").verdict.status == "passed"


def test_a_wrong_map_is_caught_although_the_logits_are_right() -> None:
    images, labels, logits = answers(64)
    maps = np.random.default_rng(0).normal(size=(64, 4, 4)).astype(np.float32)
    reference = Reference(images, labels, logits)
    right = FixedAnswers(Outputs(logits, logits, cam=maps * (1 + EXTRA_GATES["fp32"] / 2)))
    found = check_extras(right, reference, {"cam": maps}, "fp32")
    assert found is not None
    assert found["cam"] == pytest.approx(EXTRA_GATES["fp32"] / 2, rel=0.01)
    with pytest.raises(CheckError, match="its output cam is off"):
        check_extras(
            FixedAnswers(Outputs(logits, logits, cam=maps[:, ::-1])), reference, {"cam": maps}, "fp32"
        )
    with pytest.raises(CheckError, match="gives no output cam"):
        check_extras(FixedAnswers(Outputs(logits, logits)), reference, {"cam": maps}, "fp32")
    assert check_extras(right, reference, {}, "fp32") is None


def test_places_and_keys_are_looked_at_before_any_work(
    digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.pipeline.load_network", lambda *_: pytest.fail("work was begun"))
    project = tmp_path / "project"
    (project / "bundles").mkdir(parents=True)
    (project / "app.py").write_text("from flask import Flask\n")
    cases = [
        (["--space", str(project)], "holds no Space"),
        (["--sign", str(tmp_path / "no.pem")], "there is no key"),
        (["--opset", "0"], "--opset 0"),
        (["--web", str(tmp_path / "page"), "--web-variant", "int8"], "--web-variant int8 is not among"),
    ]
    for flags, words in cases:
        assert run_command(main, [str(digits_run.folder), *flags, "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
    assert (project / "app.py").read_text() == "from flask import Flask\n"


def test_a_folder_that_is_no_bundle_is_not_replaced(
    digits_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "branch0").mkdir()
    (tmp_path / "branch0" / "thesis.tex").write_text("years of work")
    assert run_command(main, [str(digits_run.folder), "--target", "branch0", "--out", str(tmp_path)]) == 2
    assert "is no bundle" in capsys.readouterr().err
    assert (tmp_path / "branch0" / "thesis.tex").read_text() == "years of work"


def test_a_provider_that_is_not_there_stops_before_any_work(
    digits_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ffl_deploy.runtime import import_onnxruntime

    if "CUDAExecutionProvider" in import_onnxruntime().get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    flags = ["--runtime", "onnxruntime-cuda", "--out", str(tmp_path / "out")]
    assert run_command(main, [str(digits_run.folder), *flags]) == 2
    assert "has no CUDAExecutionProvider" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
