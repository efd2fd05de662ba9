"""What TensorRtSession does with a GPU and its memory, and what the builder makes of TensorRT's messages,
without a GPU."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from export.write.tensorrt_engine import write_engine
from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import CheckError, DeviceLost, OtherMachine, UsageError
from ffl_deploy.manifest import Precision, Variant
from ffl_deploy.runtime.session import Outputs
from ffl_deploy.runtime.tensorrt_build import EngineOptions, build, profiles_for
from ffl_deploy.runtime.tensorrt_cache import Engine
from ffl_deploy.runtime.tensorrt_runtime import LANES, TensorRtSession
from tests.ffl_deploy.stub_tensorrt import VERSION, Cuda, failed, install

VARIANT = Variant("fp32-engine", "tensorrt", "fp32.engine", "0", 9, Precision("fp32", "fp32"))
BATCHES = (1, 4, 8)
NOTHING = (0, 0, 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A GPU of compute capability 9.0, and TensorRT."""
    stub = Cuda()
    install(monkeypatch, stub)
    return stub


def engine_of(bundle: Bundle, **changes: object) -> Engine:
    made = build(bundle.folder / "model.onnx", EngineOptions("tensorrt", batches=BATCHES))
    record = msgspec.structs.replace(made.record, **changes)
    return Engine(made.content, record, "fp32.engine", "run: ffl-engine BUNDLE")


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def same(found: Outputs, expected: Outputs) -> None:
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)


def test_profiles_cover_every_batch_once() -> None:
    assert profiles_for((1, 8, 256)) == [(1, 1, 1), (2, 8, 8), (9, 256, 256)]
    assert profiles_for((64, 8, 8)) == [(1, 8, 8), (9, 64, 64)]
    assert profiles_for((1, 8), fixed=5) == [(5, 5, 5)]


def test_answers_are_those_of_onnx_runtime_at_every_batch(
    cuda: Cuda, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = install(monkeypatch, cuda)
    session, expected = TensorRtSession(engine_of(tiny_bundle), VARIANT), tiny_bundle.session()
    for count in (1, 2, 4, 5, 8, 9, 20):
        same(session.run(images(count)), expected.run(images(count)))
    assert (session.device, session.gpu) == ("NVIDIA Stub (9.0)", "NVIDIA Stub (9.0)")
    assert session.computed == "fp32"
    assert trt.runs[:5] == [(0, 1), (1, 2), (1, 4), (2, 5), (2, 8)], (
        "each batch by the profile that is for it"
    )
    assert [rows for _, rows in trt.runs[5:]] == [8, 1, 8, 8, 4], "in pieces of the largest"


def test_calls_from_several_threads_share_the_lanes(cuda: Cuda, tiny_bundle: Bundle) -> None:
    session, expected = TensorRtSession(engine_of(tiny_bundle), VARIANT), tiny_bundle.session()
    together = threading.Barrier(4)

    def call(seed: int) -> Outputs:
        if seed < 4:
            together.wait(10)
        return session.run(images(1 + 2 * (seed % 2), seed))

    with ThreadPoolExecutor(4) as pool:
        for seed, found in enumerate(pool.map(call, range(40))):
            same(found, expected.run(images(1 + 2 * (seed % 2), seed)))
    assert 1 <= len(cuda.streams) <= LANES
    session.close()
    assert cuda.held == NOTHING


@pytest.mark.parametrize("how", ["closed", "closed twice", "forgotten"])
def test_a_session_gives_its_buffers_back(cuda: Cuda, tiny_bundle: Bundle, how: str) -> None:
    session = TensorRtSession(engine_of(tiny_bundle), VARIANT)
    assert session.run(images(20)).logits.shape == (20, 3)
    assert cuda.held == (3, 3, 1)
    on_gpu = sum(len(memory) for pointer, memory in cuda.live.items() if pointer not in cuda.pinned)
    assert on_gpu == 8 * (32 * 32 * 3 + 2 * 4 * 3), "for the largest batch"
    if how.startswith("closed"):
        for _ in how.split():
            session.close()
    del session
    gc.collect()
    assert cuda.held == NOTHING


@pytest.mark.parametrize("allocations", range(6))
def test_what_was_allocated_before_an_error_is_given_back(
    cuda: Cuda, tiny_bundle: Bundle, allocations: int
) -> None:
    cuda.fail_after = allocations
    with pytest.raises(CheckError, match=r"^CUDA failed: cudaErrorMemoryAllocation \(out of memory\)\.$"):
        TensorRtSession(engine_of(tiny_bundle), VARIANT)
    assert cuda.held == NOTHING


def test_without_room_for_a_second_lane_calls_wait_for_the_first(cuda: Cuda, tiny_bundle: Bundle) -> None:
    session = TensorRtSession(engine_of(tiny_bundle), VARIANT)
    cuda.fail_after = cuda.calls["malloc"] + 1
    expected = tiny_bundle.session().run(images(3))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: session.run(images(3)), range(16)):
            same(found, expected)
    session.close()
    assert cuda.held == NOTHING


def test_an_error_that_cuda_does_not_come_back_from_says_so(cuda: Cuda, tiny_bundle: Bundle) -> None:
    session = TensorRtSession(engine_of(tiny_bundle), VARIANT)
    cuda.broken = failed("cudaErrorIllegalAddress", 700)
    with pytest.raises(
        DeviceLost, match=r"^the GPU failed: cudaErrorIllegalAddress \(an illegal memory access"
    ):
        session.run(images(3))
    session.close()
    assert cuda.held == NOTHING


def test_what_tensorrt_cannot_load_or_prepare_is_one_sentence(
    cuda: Cuda, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_bundle)
    with pytest.raises(
        CheckError, match=r"^TensorRT cannot load fp32\.engine: it gave no reason; run: ffl-engine"
    ):
        TensorRtSession(engine._replace(content=b"not an engine"), VARIANT)
    install(monkeypatch, cuda).no_context = True
    with pytest.raises(CheckError, match=r"^TensorRT cannot prepare fp32\.engine.*free some GPU memory\.$"):
        TensorRtSession(engine, VARIANT)
    assert cuda.held == NOTHING


def test_a_batch_that_the_engine_does_not_take_is_refused(cuda: Cuda, tiny_bundle: Bundle) -> None:
    session = TensorRtSession(engine_of(tiny_bundle, profiles=[[4, 8, 8]]), VARIANT)
    with pytest.raises(
        CheckError, match=r"no batch of shape \(3, 32, 32, 3\): no profile of it has this size"
    ):
        session.run(images(3))
    with pytest.raises(CheckError, match=r"takes no batch of shape \(5, 8, 8, 3\)"):
        session.run(np.zeros((5, 8, 8, 3), np.uint8))


def test_an_engine_of_another_gpu_or_version_does_not_run_here(cuda: Cuda, tiny_bundle: Bundle) -> None:
    engine = engine_of(tiny_bundle)
    cuda.capability = (7, 5)
    with pytest.raises(
        OtherMachine, match=r"compute capability 9\.0, this GPU has 7\.5; run: ffl-engine BUNDLE\.$"
    ):
        TensorRtSession(engine, VARIANT)
    older = msgspec.structs.replace(engine.record, version="10.12")
    with pytest.raises(
        OtherMachine, match=rf"built by tensorrt 10\.12, this machine has {VERSION}.*ffl-engine"
    ):
        TensorRtSession(engine._replace(record=older), VARIANT)
    assert cuda.held == NOTHING


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        (Cuda(driver=0), "there is no NVIDIA driver on this machine"),
        (Cuda(driver=12080), "the NVIDIA driver is for CUDA 12.8 and too old for the installed CUDA 13.5"),
        (Cuda(count=0), "there is no NVIDIA GPU that can be used (cudaErrorNoDevice)"),
    ],
    ids=["no driver", "old driver", "no GPU"],
)
def test_without_a_gpu_one_sentence_says_why(
    gpu: Cuda, says: str, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, gpu)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UsageError) as caught:
        tiny_bundle.session(runtime="tensorrt")
    assert str(caught.value).startswith(says)
    assert str(caught.value).endswith("--variant fp32 --runtime onnxruntime.")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if gpu.driver >= 13000:
        with pytest.raises(UsageError, match="because CUDA_VISIBLE_DEVICES is set to nothing: unset it"):
            tiny_bundle.session(runtime="tensorrt")


def test_an_engine_is_built_although_tactics_were_skipped(
    cuda: Cuda, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT 10 logs each tactic that it cannot use as an error and builds the engine without it
    (NVIDIA/TensorRT #4028)."""
    complaint = (
        "Error Code: 9: Skipping tactic 0xfe80445f7bb61a99 due to exception Assertion vol == GK failed."
    )
    trt = install(monkeypatch, cuda, complaint=complaint)
    path = tmp_path / "fp32.engine"
    record = write_engine(tiny_bundle.folder / "model.onnx", path, EngineOptions("tensorrt"))
    assert msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=type(record)) == record
    assert path.stat().st_size > (tiny_bundle.folder / "model.onnx").stat().st_size
    assert record.log == [complaint]
    assert (record.compute_capabilities, record.gpu) == (["9.0"], "NVIDIA Stub"), (
        "the GPU that it was built on, and for"
    )
    assert record.profiles == [[1, 1, 1], [2, 8, 8], [9, 256, 256]]
    assert record.profile == {"min": 1, "opt": 256, "max": 256}
    assert trt.built[0].cleared == [trt.BuilderFlag.TF32]


def test_what_the_builder_cannot_build_is_refused_with_its_reason(
    cuda: Cuda, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, cuda, complaint="no kernel for this layer", builds=False)
    source, path = tiny_bundle.folder / "model.onnx", tmp_path / "fp32.engine"
    with pytest.raises(
        CheckError, match=r"tensorrt cannot build model\.onnx for compute capability 9\.0: no kernel"
    ):
        write_engine(source, path, EngineOptions("tensorrt"))
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(CheckError, match=r"TensorRT cannot read model\.onnx: "):
        write_engine(tmp_path / "model.onnx", path, EngineOptions("tensorrt"))
    assert not path.exists()


def test_a_capability_is_refused_where_tensorrt_takes_none(cuda: Cuda, tiny_bundle: Bundle) -> None:
    with pytest.raises(
        UsageError, match="builds for this machine's GPU only; leave --compute-capability out"
    ):
        build(tiny_bundle.folder / "model.onnx", EngineOptions("tensorrt", ("9.0",)))


def test_an_engine_from_before_profiles_were_recorded_runs(cuda: Cuda, tiny_bundle: Bundle) -> None:
    options = replace(EngineOptions("tensorrt"), batches=(8,))
    made = build(tiny_bundle.folder / "model.onnx", options)
    record = msgspec.structs.replace(made.record, profiles=[], profile={"min": 1, "opt": 8, "max": 8})
    session = TensorRtSession(Engine(made.content, record, "fp32.engine", "rebuild"), VARIANT)
    same(session.run(images(9)), tiny_bundle.session().run(images(9)))
