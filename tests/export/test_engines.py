"""Engines that export builds where their GPU is are verified as any variant, on a stand-in for TensorRT that
computes what the file says; without the GPU they say that they were not."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from export.cli import main
from ffl_deploy.bundle import load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.run_directory import Run
from ffl_deploy.verify import main as verify_main
from tests.ffl_deploy.stub_tensorrt import VERSION, Cuda, install


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cuda:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Cuda()


def export(run: Run, out: Path, *flags: str) -> int:
    return run_command(
        main, [str(run.folder), "--target", "branch0", "--tensorrt", "--out", str(out), *flags]
    )


def test_an_engine_built_on_its_gpu_is_verified_measured_and_recommended(
    digits_run: Run,
    tmp_path: Path,
    cuda: Cuda,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(monkeypatch, cuda)
    assert export(digits_run, tmp_path / "out", "--min-accuracy", "0.1") == 0
    said = capsys.readouterr().out
    assert "fp32-engine (tensorrt, " in said
    assert "not verified here" not in said
    bundle = load_bundle(tmp_path / "out" / "branch0")
    fp32, engine = bundle.variant("fp32"), bundle.variant("fp32-engine")
    assert engine.parity is not None
    assert engine.parity.verdict.status == "passed"
    assert engine.parity.gate.precision == "fp32"
    assert max(map(int, engine.parity.batches)) > 64, "at every batch size that other variants are held to"
    assert engine.accuracy is not None
    assert fp32.accuracy is not None
    assert engine.accuracy.value == pytest.approx(fp32.accuracy.value, abs=0.003)
    assert engine.accuracy.n == fp32.accuracy.n
    assert engine.latency is not None
    assert fp32.latency is not None
    assert (engine.latency.where, engine.latency.threads) == ("NVIDIA Stub (9.0)", 0), (
        "not the processor's name"
    )
    assert " threads of " in fp32.latency.where
    assert engine.details.engine is not None
    assert engine.details.engine.profiles == [[1, 1, 1], [2, 8, 8], [9, 256, 256]]
    outcome = bundle.manifest.verified_on[0].variants["fp32-engine"]  # type: ignore[index]
    assert outcome.runtime == f"tensorrt {VERSION}"
    rows = {row["variant"]: row for row in json.loads((tmp_path / "out" / "report.json").read_text())["rows"]}
    assert rows["fp32-engine"]["parity"] == "passed"
    assert rows["fp32-engine"]["p50_ms"] > 0, "what the report can rank and recommend"
    assert cuda.held == (0, 0, 0)

    assert run_command(verify_main, [str(bundle.folder)]) == 0
    assert "fp32-engine on tensorrt: " in capsys.readouterr().out


def test_triton_takes_the_profile_that_fits_a_batch(
    digits_run: Run, tmp_path: Path, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself it takes the first one of an engine, which is for a lone image."""
    model_config = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="Triton's protobuf is not installed"
    )
    from google.protobuf import text_format

    install(monkeypatch, cuda)
    assert export(digits_run, tmp_path / "out", "--triton", str(tmp_path / "triton")) == 0
    text = (tmp_path / "triton" / "branch0-fp32-engine" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config.ModelConfig())
    (group,) = config.instance_group
    assert list(group.profile) == ["0", "1", "2"]
    assert group.kind == model_config.ModelInstanceGroup.KIND_GPU
    assert config.max_batch_size == 256
    plain = (tmp_path / "triton" / "branch0" / "config.pbtxt").read_text()
    assert "instance_group" not in plain


def wrong_engine(trt: ModuleType) -> None:
    """Its engines answer with noise beside the logits."""
    real = trt.Runtime(None).deserialize_cuda_engine

    def deserialize(content: bytes) -> object:
        engine = real(content)
        run = engine.session.run

        def noisy(names: object, feeds: object) -> list[np.ndarray]:
            logits, *rest = run(names, feeds)
            return [logits + np.random.default_rng(0).normal(0, 3, logits.shape).astype(np.float32), *rest]

        outputs, inputs = engine.session.get_outputs(), engine.session.get_inputs()
        engine.session = type(
            "Noisy",
            (),
            {"run": staticmethod(noisy), "get_outputs": lambda _: outputs, "get_inputs": lambda _: inputs},
        )()
        return engine

    trt.Runtime = lambda log: type("Runtime", (), {"deserialize_cuda_engine": staticmethod(deserialize)})()


def test_an_engine_with_other_answers_is_no_part_of_a_bundle(
    digits_run: Run,
    tmp_path: Path,
    cuda: Cuda,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong_engine(install(monkeypatch, cuda))
    assert export(digits_run, tmp_path / "out") == 1
    assert "variant fp32-engine does not give PyTorch's logits" in capsys.readouterr().err
    bundle = load_bundle(tmp_path / "out" / "branch0")
    assert [variant.name for variant in bundle.manifest.variants] == ["fp32"]
    assert not list(bundle.folder.rglob("*.engine"))
    assert cuda.held == (0, 0, 0)


def test_an_engine_built_elsewhere_says_so(
    digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorRT for RTX builds without a GPU."""
    install(monkeypatch, Cuda(driver=0), "tensorrt_rtx")
    assert export(digits_run, tmp_path / "out", "--compute-capability", "8.9", "--min-accuracy", "0.1") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "fp32-engine (tensorrt" in line)
    assert line.endswith(", not verified here")
    engine = load_bundle(tmp_path / "out" / "branch0").variant("fp32-engine")
    assert (engine.parity, engine.accuracy, engine.latency) == (None, None, None)
    rows = {row["variant"]: row for row in json.loads((tmp_path / "out" / "report.json").read_text())["rows"]}
    assert rows["fp32-engine"]["parity"] == "not verified here"


@pytest.mark.parametrize(
    ("cuda", "flags", "says"),
    [
        (
            Cuda(driver=0),
            [],
            "there is no NVIDIA driver on this machine, so no GPU to compute on; tensorrt builds on the",
        ),
        (
            Cuda(),
            ["--compute-capability", "8.9"],
            "builds for this machine's GPU only; leave --compute-capability out",
        ),
    ],
)
def test_what_cannot_be_built_for_stops_before_any_work(
    cuda: Cuda, flags: list[str], says: str, digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install(monkeypatch, cuda)
    assert export(digits_run, tmp_path / "out", *flags) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert (said.out, (tmp_path / "out").exists()) == ("", False)
