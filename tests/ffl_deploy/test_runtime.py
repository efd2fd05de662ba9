"""Runtimes behind one interface: the same answers, from several threads, and no silent fallback."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace

import msgspec
import numpy as np
import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.runtime import RUNTIMES, OnnxRuntimeSession, Outputs, Session, import_onnxruntime
from ffl_deploy.runtime.onnx_binding import BoundRuns, pinned_array
from ffl_deploy.runtime.onnx_runtime import gpu_lost
from ffl_deploy.runtime.session import FixedBatchSession, padded_sizes
from tests.ffl_deploy.stub_tensorrt import Cuda


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_gives_the_golden_logits_at_any_batch(tiny_bundle: Bundle, runtime: str) -> None:
    pytest.importorskip(runtime)
    session, golden = tiny_bundle.session(runtime=runtime), tiny_bundle.golden()
    assert session.runtime == runtime
    for batch in (1, 3, len(golden.images)):
        logits = session.run(golden.images[:batch]).logits
        assert logits.dtype == np.float32
        assert logits == pytest.approx(golden.logits[:batch], abs=1e-4 * float(golden.logits.std()))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_session_serves_several_threads_at_once(tiny_bundle: Bundle, runtime: str) -> None:
    pytest.importorskip(runtime)
    session = tiny_bundle.session(runtime=runtime, threads=1)
    batches = [images(1 + seed % 5, seed) for seed in range(40)]
    alone = [session.run(batch).logits.copy() for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda batch: session.run(batch).logits, batches))
    for expected, found in zip(alone, together, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_signal_after_openvinos_sessions_reaches_its_handler(tiny_bundle: Bundle) -> None:
    """OpenVINO leaves the thread a freed signal stack when two Cores end in the order of their
    making (SIGSEGV, in ffl-serve at SIGTERM and in whatever waits for a child)."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    program = """
        import os, signal, sys
        from pathlib import Path
        from ffl_deploy.runtime.openvino_runtime import OpenVinoSession
        first, second = (OpenVinoSession(Path(sys.argv[1]), "fp32") for _ in range(2))
        del first
        del second
        caught = []
        signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
        os.kill(os.getpid(), signal.SIGUSR1)
        print(caught == [signal.SIGUSR1])
    """
    model = tiny_bundle.folder / "model.onnx"
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(model)], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "True"), ran.stderr


def test_openvino_computes_an_fp32_file_in_fp32(tiny_bundle: Bundle) -> None:
    """Left alone it takes bf16 where the processor has it,
    which breaks the fp32 gate a hundred times over."""
    openvino = pytest.importorskip("ffl_deploy.runtime.openvino_runtime")
    pytest.importorskip("openvino")
    model = tiny_bundle.folder / "model.onnx"
    assert openvino.OpenVinoSession(model, "fp32").computed == "fp32"
    assert openvino.OpenVinoSession(model, "fp32").layer_precisions().keys() == {"fp32"}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_what_cannot_be_loaded_or_run_is_one_sentence(
    tiny_bundle: Bundle, runtime: str, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    broken = tmp_path / "model.onnx"
    broken.write_bytes((tiny_bundle.folder / "model.onnx").read_bytes()[:200])
    with pytest.raises(CheckError) as caught:
        RUNTIMES[runtime].open(broken, tiny_bundle.variant(), None)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckError, match="cannot run a batch of 2") as caught:
        tiny_bundle.session(runtime=runtime).run(np.zeros((2, 5, 32, 3), np.uint8))
    assert "\n" not in str(caught.value)


def test_a_provider_that_falls_back_silently_is_an_error(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu without a working GPU opens the session on the CPU and says nothing."""
    import onnxruntime

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # whatever this machine has

    class Fallen:
        def __init__(self, *_: object, **__: object) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    fake = SimpleNamespace(
        __version__="1",
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=Fallen,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setattr("ffl_deploy.runtime.onnx_runtime.import_onnxruntime", lambda: fake)
    with pytest.raises(UsageError, match=r"^no NVIDIA GPU is visible|^there is no NVIDIA driver"):
        OnnxRuntimeSession(tiny_bundle.folder / "model.onnx", "fp32", runtime="onnxruntime-cuda")
    monkeypatch.setattr("ffl_deploy.runtime.gpu.this_gpu", lambda: None)
    with pytest.raises(UsageError, match="fell back to CPUExecutionProvider"):
        OnnxRuntimeSession(tiny_bundle.folder / "model.onnx", "fp32", runtime="onnxruntime-cuda")
    with pytest.raises(UsageError, match="fell back to CPUExecutionProvider"):
        RUNTIMES["onnxruntime-cuda"].require()  # before any work, though the provider is listed
    fake.get_available_providers = lambda: ["CPUExecutionProvider"]
    with pytest.raises(UsageError, match=r"has no CUDAExecutionProvider.*\[gpu\]"):
        RUNTIMES["onnxruntime-cuda"].require()


def bound(bundle: Bundle) -> BoundRuns:
    """What runs on a GPU, on the memory of the CPU."""
    ort = import_onnxruntime()
    session = ort.InferenceSession(bundle.folder / "model.onnx", providers=["CPUExecutionProvider"])
    return BoundRuns(ort, session, [output.name for output in session.get_outputs()], "cpu")


def test_bound_buffers_give_the_same_answers_at_any_batch(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffl_deploy.runtime.onnx_binding.LARGEST", 16)
    runs, plain = bound(tiny_bundle), tiny_bundle.session()
    sizes = []
    original = runs._session.run_with_iobinding

    def run(binding: object) -> None:
        original(binding)
        sizes.append(binding.get_outputs()[0].shape()[0])  # type: ignore[attr-defined]

    runs._session = SimpleNamespace(io_binding=runs._session.io_binding, run_with_iobinding=run)
    for count in (1, 3, 16, 37, 5, 3):
        pixels = images(count, count)
        found, expected = runs.run(pixels), plain.run(pixels)
        np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-6)
        np.testing.assert_allclose(found["probabilities"], expected.probabilities, atol=1e-6)
    assert sizes == [1, 4, 16, 16, 16, 8, 8, 4], "few sizes: padded to a power of two"


def test_an_answer_is_not_overwritten_by_the_next(tiny_bundle: Bundle) -> None:
    runs = bound(tiny_bundle)
    first = runs.run(images(4, 1))["logits"]
    kept = first.copy()
    runs.run(images(4, 2))
    np.testing.assert_array_equal(first, kept)


def test_bound_buffers_serve_several_threads_at_once(tiny_bundle: Bundle) -> None:
    runs, plain = bound(tiny_bundle), tiny_bundle.session(threads=1)
    batches = [images(1 + seed % 5, seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda batch: runs.run(batch)["logits"], batches))
    for batch, found in zip(batches, together, strict=True):
        np.testing.assert_allclose(found, plain.run(batch).logits, atol=1e-5)


def test_pinned_memory_is_given_back(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr("ffl_deploy.runtime.onnx_binding.import_cuda", lambda: cuda)
    held = ExitStack()
    array = pinned_array((3, 4, 4, 3), held)
    assert (array.shape, array.any()) == ((3, 4, 4, 3), False)
    assert cuda.held == (0, 1, 0)
    held.close()
    assert cuda.held == (0, 0, 0)
    cuda.fail_after = 0
    assert pinned_array((3, 4, 4, 3), held).shape == (3, 4, 4, 3), "ordinary memory, where there is no more"


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=x ; file=y", True),
        ("CUDA error 719: unspecified launch failure", True),
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=x", False),
        ("BFCArena: Failed to allocate memory for requested buffer of size 700", False),
    ],
)
def test_an_error_that_cuda_does_not_come_back_from_is_told_apart(message: str, lost: bool) -> None:
    assert gpu_lost(message) is lost


@pytest.mark.parametrize(
    ("providers", "loads"),
    [(["CUDAExecutionProvider", "CPUExecutionProvider"], 1), (["CPUExecutionProvider"], 0)],
)
def test_cuda_libraries_are_loaded_from_their_wheels_once(
    providers: list[str], loads: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They lie where no loader looks; onnxruntime-gpu does not look for them by itself,
    and prints when it is told to."""
    calls = []

    def preload_dlls() -> None:
        calls.append(1)
        print("Failed to load libcudnn.so.9")
        raise OSError("libcudnn.so.9")

    fake = ModuleType("onnxruntime")
    vars(fake).update(get_available_providers=lambda: providers, preload_dlls=preload_dlls)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    assert import_onnxruntime() is fake
    assert import_onnxruntime() is fake
    assert len(calls) == loads
    assert capfd.readouterr().out == ""


class Echo(Session):
    """Gives back each image's first pixel as its logits, and remembers the batches it was called with."""

    runtime, variant = "echo", "fp32"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, images: np.ndarray) -> Outputs:
        self.batches.append(len(images))
        first = images[:, 0, 0, :].astype(np.float32)
        return Outputs(first, first / 255)


@pytest.mark.parametrize("count", [1, 4, 6, 9])
def test_a_static_batch_is_padded_and_the_padding_dropped(count: int) -> None:
    echo = Echo()
    pixels = images(count)
    outputs = FixedBatchSession(echo, 4).run(pixels)
    np.testing.assert_array_equal(outputs.logits, pixels[:, 0, 0, :].astype(np.float32))
    assert outputs.cam is None
    assert set(echo.batches) == {4}
    assert len(echo.batches) == -(-count // 4)


def test_the_manifest_says_whether_to_pad(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    dynamic = make_bundle(tmp_path / "tiny", bound=False)  # the models of others say their batch themselves
    static = msgspec.structs.replace(dynamic.manifest.input, batch=4)
    bundle = Bundle(dynamic.folder, msgspec.structs.replace(dynamic.manifest, input=static))
    assert isinstance(bundle.session(), FixedBatchSession)
    assert isinstance(dynamic.session(), OnnxRuntimeSession)


def test_padded_sizes_are_few_and_reach_the_largest() -> None:
    assert padded_sizes(1) == [1]
    assert padded_sizes(32) == [1, 2, 4, 8, 16, 32]
    assert padded_sizes(48) == [1, 2, 4, 8, 16, 32, 48]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None], ids=["nan", "inf", "minus-inf", "none"])
@pytest.mark.parametrize("large", [1.0, 1e30], ids=["small", "squares-overflow"])
@pytest.mark.parametrize("where", ["logits", "probabilities"])
def test_all_finite_says_what_finite_says(where: str, large: float, bad: float | None) -> None:
    """Also where a sum of squares overflows though every value is a number."""
    values = {"logits": np.full((3, 5), large, np.float32), "probabilities": np.full((3, 5), 0.2, np.float32)}
    if bad is not None:
        values[where][1, 2] = bad
    outputs = Outputs(**values)
    assert outputs.all_finite is bool(outputs.finite.all()) is (bad is None)
