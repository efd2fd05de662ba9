"""A session answers only where it gives PyTorch's logits of the golden samples;
a verdict is asked for once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ffl_deploy import load_bundle, private_cache, processor, selfcheck
from ffl_deploy.bundle import Bundle
from ffl_deploy.bundle_files import GoldenSamples, write_golden
from ffl_deploy.errors import CheckError
from ffl_deploy.manifest import file_records, write_manifest
from ffl_deploy.parity import PARITY_GATES
from ffl_deploy.runtime import OnnxRuntimeSession, Outputs
from ffl_deploy.selfcheck import broken_gate

IMAGE = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(variant, images) of every run of ONNX Runtime that a test causes."""
    made: list[tuple[str, int]] = []
    real = OnnxRuntimeSession.run

    def run(self: OnnxRuntimeSession, images: np.ndarray) -> Outputs:
        made.append((self.variant, len(images)))
        return real(self, images)

    monkeypatch.setattr(OnnxRuntimeSession, "run", run)
    return made


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    """`int8` and `other` hold other weights than those of the golden samples, which are four images and no
    made-up pictures: runs are counted here."""
    return make_bundle(
        tmp_path / "bundle", variants=("fp32", "int8", "other"), wrong=("int8", "other"), bound=False
    )


def with_golden(bundle: Bundle, **arrays: np.ndarray) -> Bundle:
    """-> `bundle` with other golden samples; every hash is right."""
    golden = write_golden(bundle.folder, bundle.golden()._replace(**arrays), "a test")
    files = file_records(bundle.folder)
    write_manifest(bundle.folder, msgspec.structs.replace(bundle.manifest, golden=golden, files=files))
    return load_bundle(bundle.folder)


def test_a_wrong_session_is_refused_with_one_that_holds(bundle: Bundle, runs: list[tuple[str, int]]) -> None:
    for ask in (lambda: bundle.session("int8"), lambda: bundle.predict([IMAGE], variant="int8")):
        with pytest.raises(CheckError) as caught:
            ask()
        assert caught.value.exit_code == 1
        sentence = str(caught.value)
        assert sentence.startswith("variant int8 of ")
        assert "does not give PyTorch's logits on this processor with onnxruntime (" in sentence
        assert "mean KL divergence" in sentence
        assert "gate 1e-06" in sentence
        assert sentence.endswith("; use --variant fp32, which holds here.")
    assert ("int8", 1) in runs
    assert bundle.predict([IMAGE])[0].label in bundle.classes
    assert bundle.session("int8", check=False).run(bundle.golden().images).logits.shape == (4, 3), (
        "who judges for himself may"
    )


def test_where_none_holds_the_sentence_says_so(bundle: Bundle) -> None:
    changed = with_golden(bundle, logits=bundle.golden().logits[:, ::-1].copy())
    with pytest.raises(CheckError, match="no variant of it holds here: export it again"):
        changed.session()


def test_a_number_that_is_none_is_refused(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """Golden samples with finite logits, on which this machine computes NaN."""
    finite = make_bundle(tmp_path / "finite")
    nan = make_bundle(tmp_path / "nan", nonfinite_above=1.0)
    changed = with_golden(nan, logits=finite.golden().logits, images=finite.golden().images)
    with pytest.raises(CheckError, match="number of images with NaN or infinite logits 4, gate 0"):
        changed.predict([IMAGE])


def test_damaged_samples_are_the_bundles_fault(bundle: Bundle) -> None:
    path = bundle.folder / "golden.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckError, match=r"golden\.npz was changed since export"):
        bundle.session()


def test_a_session_that_cannot_run_its_samples_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OnnxRuntimeSession.run

    def run(self: OnnxRuntimeSession, images: np.ndarray) -> Outputs:
        if self.variant == "int8":
            raise CheckError("ONNX Runtime cannot run a batch of 1: no kernel.")
        return real(self, images)

    monkeypatch.setattr(OnnxRuntimeSession, "run", run)
    with pytest.raises(
        CheckError, match=r"\(ONNX Runtime cannot run a batch of 1: no kernel\); use --variant fp32"
    ):
        bundle.session("int8")


def test_what_holds_on_the_own_runtime_alone_is_named_with_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    from ffl_deploy.runtime.openvino_runtime import OpenVinoSession

    real = OpenVinoSession.run

    def run(self: OpenVinoSession, images: np.ndarray) -> Outputs:
        outputs = real(self, images)
        return outputs._replace(logits=outputs.logits + np.float32([0, 1, 0]))

    monkeypatch.setattr(OpenVinoSession, "run", run)
    with pytest.raises(CheckError, match=r"use --variant fp32 --runtime onnxruntime, which holds here\.$"):
        bundle.session("fp32", "openvino")


def test_the_samples_are_run_once(bundle: Bundle, runs: list[tuple[str, int]], empty_cache: Path) -> None:
    bundle.session()
    assert runs == [("fp32", 1)] * 4 + [("fp32", 4)], "batches 1, and 4, which are all"
    runs.clear()
    (bundle.folder / "golden.npz").unlink()  # not even read a second time
    for _ in range(2):
        load_bundle(bundle.folder).session()
    assert runs == []
    (entry,) = empty_cache.rglob("*.json")
    assert msgspec.json.decode(entry.read_bytes())["answer"] == "passed"


def test_a_refusal_is_found_anew_each_time(
    bundle: Bundle, runs: list[tuple[str, int]], empty_cache: Path
) -> None:
    """A driver or a library may be mended without a trace in its version."""
    for _ in range(2):
        runs.clear()
        with pytest.raises(CheckError):
            bundle.session("int8")
        assert runs.count(("int8", 4)) == 1
    entries = [msgspec.json.decode(path.read_bytes()) for path in empty_cache.rglob("*.json")]
    assert [(entry["question"]["variant"], entry["answer"]) for entry in entries] == [("fp32", "passed")]


def versions(patch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    patch.setattr(onnxruntime, "__version__", "9.9.9")


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "runtime": versions,
    "instruction sets": lambda patch: patch.setattr(processor, "features", lambda: "SSE2"),
    "processor": lambda patch: patch.setattr(processor, "cpuinfo", lambda: "model name: another"),
    "kernels": lambda patch: patch.setattr(processor, "pair_sum", lambda: "1"),
    "switch": lambda patch: patch.setenv("DNNL_MAX_CPU_ISA", "AVX2"),
    "gate": lambda patch: patch.setitem(
        PARITY_GATES, "fp32", msgspec.structs.replace(PARITY_GATES["fp32"], mean_kl=2e-6)
    ),
    "check": lambda patch: patch.setattr(selfcheck, "VERSION", selfcheck.VERSION + 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_where_something_else_computes_the_samples_run_again(
    bundle: Bundle, runs: list[tuple[str, int]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle.session()
    with monkeypatch.context() as patch:
        CHANGES[name](patch)
        for expected in (5, 0):
            runs.clear()
            bundle.session()
            assert len(runs) == expected
    runs.clear()
    bundle.session()
    assert runs == [], "the verdict of before still stands"


def test_threads_and_files_are_part_of_the_question(
    bundle: Bundle, runs: list[tuple[str, int]], make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle.session(threads=1)
    runs.clear()
    bundle.session(threads=3)
    assert len(runs) == 5
    runs.clear()
    bundle.session(threads=3)
    assert runs == []
    make_bundle(tmp_path / "other", seed=7, bound=False).session(threads=1)
    assert len(runs) == 5


def test_a_file_that_was_changed_is_refused_whatever_is_remembered(bundle: Bundle) -> None:
    bundle.session()
    path = bundle.folder / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckError, match="was changed since export"):
        load_bundle(bundle.folder).session()


def test_without_a_cache_the_samples_run_each_time(
    bundle: Bundle,
    runs: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(private_cache, "cache_home", lambda: None)
    for _ in range(2):
        runs.clear()
        assert bundle.session().run(bundle.golden().images).logits.shape == (4, 3)
        assert len(runs) == 6
    assert capfd.readouterr() == ("", "")


def test_a_runtime_that_cannot_be_described_is_asked_each_time(
    bundle: Bundle, runs: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    """A GPU whose driver does not say what it is."""
    monkeypatch.setattr(selfcheck, "kernels", lambda runtime: None)
    for _ in range(2):
        runs.clear()
        bundle.session()
        assert len(runs) == 5
    assert not list(empty_cache.rglob("*.json"))


def test_a_servers_batches_run_whatever_is_remembered(
    bundle: Bundle, runs: list[tuple[str, int]], empty_cache: Path
) -> None:
    session = bundle.session()
    remembered = list(empty_cache.rglob("*.json"))
    runs.clear()
    assert broken_gate(bundle, bundle.variant(), session, batches=[1, 3]) == ""
    assert [images for _, images in runs] == [1, 1, 1, 1, 3, 1]
    assert list(empty_cache.rglob("*.json")) == remembered


def test_a_batch_that_is_fixed_is_checked_too(
    make_bundle: Callable[..., Bundle], tmp_path: Path, runs: list[tuple[str, int]]
) -> None:
    """Padded to the only size that the graph takes."""
    bundle = make_bundle(tmp_path / "fixed", variants=("fp32", "int8"), wrong=("int8",), bound=False)
    manifest = msgspec.structs.replace(
        bundle.manifest, input=msgspec.structs.replace(bundle.manifest.input, batch=2)
    )
    write_manifest(bundle.folder, manifest)
    fixed = load_bundle(bundle.folder)
    fixed.session()
    assert {images for _, images in runs} == {2}
    runs.clear()
    fixed.session()
    assert runs == []
    with pytest.raises(CheckError, match="use --variant fp32"):
        fixed.session("int8")


def test_a_refused_session_gives_back_what_it_holds(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(OnnxRuntimeSession, "close", lambda self: closed.append(self.variant))
    with pytest.raises(CheckError):
        bundle.session("int8")
    assert sorted(closed) == ["fp32", "int8"], "the one that was tried in its place too"


def test_more_samples_than_a_batch(
    make_bundle: Callable[..., Bundle], tmp_path: Path, runs: list[Any]
) -> None:
    bundle = make_bundle(tmp_path / "many", golden_count=70)
    bundle.session()
    assert sorted({images for _, images in runs}) == [1, 7, 74], "four of them made up"
    assert isinstance(bundle.golden(), GoldenSamples)
