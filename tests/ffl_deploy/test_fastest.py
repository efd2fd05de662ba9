"""`auto` takes the fastest variant that holds, and never one that does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ffl_deploy import fastest as module
from ffl_deploy import load_bundle, processor, verdicts
from ffl_deploy.bundle import Bundle
from ffl_deploy.command import run_command
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.fastest import Choice, Timings
from ffl_deploy.manifest import Precision, write_manifest
from ffl_deploy.runtime import Outputs, Session
from ffl_deploy.verify import main as verify_main

IMAGE = np.zeros((4, 4, 3), np.uint8)
GONE, UNKNOWN = Choice("gone", "onnxruntime", "", {}, {}), Choice("int8", "no", "", {}, {})


class Stopwatch:
    """Stands in for `timed`: a run of VARIANT takes `seconds[VARIANT]`; counts how often it was asked."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.asked = seconds, 0

    def __call__(self, sessions: Sequence[Session], images: np.ndarray) -> Timings:
        self.asked += 1
        return Timings(32, [[self.seconds[session.variant]] * 3 for session in sessions])


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and ONNX Runtime as the only runtime that is tried everywhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "EVERYWHERE", ("onnxruntime",))


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    """fp32, int8 and fp16 hold, `int8-wrong` does not."""
    made = make_bundle(
        tmp_path / "bundle", variants=("int8-wrong", "int8", "fp32", "fp16"), wrong=("int8-wrong",)
    )
    variants = [
        msgspec.structs.replace(variant, precision=Precision(variant.name.removesuffix("-wrong"), "fp32"))
        for variant in made.manifest.variants
    ]
    write_manifest(made.folder, msgspec.structs.replace(made.manifest, variants=variants))
    return load_bundle(made.folder)


def stub(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> Stopwatch:
    watch = Stopwatch(**seconds)
    monkeypatch.setattr(module, "timed", watch)
    return watch


def test_the_fastest_that_holds_is_taken(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, fp32=0.4, fp16=0.2, int8=0.1)  # a KeyError, were the wrong one timed
    choice = bundle.fastest()
    assert (choice.variant, choice.runtime) == ("int8", "onnxruntime")
    assert choice.images_per_second == {
        "fp32 on onnxruntime": 80,
        "fp16 on onnxruntime": 160,
        "int8 on onnxruntime": 320,
    }
    assert list(choice.refused) == ["int8-wrong on onnxruntime"]
    assert "mean KL divergence" in choice.refused["int8-wrong on onnxruntime"]
    assert choice.why == (
        "int8 on onnxruntime is the fastest that holds its gate here: 320 images/s at batch 32, fp32 on "
        "onnxruntime 80, fp16 on onnxruntime 160; does not hold or run here: int8-wrong on onnxruntime"
    )
    assert bundle.session("auto").variant == "int8"
    np.testing.assert_allclose(
        bundle.predict([IMAGE], variant="auto")[0].logits, bundle.predict([IMAGE])[0].logits, rtol=1e-5
    )


def test_a_coarser_precision_has_to_be_worth_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, fp32=1.0, fp16=0.98, int8=0.97)
    choice = bundle.fastest()
    assert choice.variant == "fp32"
    assert "(a coarser precision has to be 5% faster)" in choice.why


def test_rounds_are_compared_by_pairs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the cores in some rounds: all of a round's runs meet it."""
    seconds = {
        "fp32": [1.0, 9.0, 1.0, 9.0, 9.0],
        "fp16": [2.0, 18.0, 2.0, 18.0, 18.0],
        "int8": [0.5, 4.5, 0.5, 4.5, 4.5],
    }
    monkeypatch.setattr(
        module, "timed", lambda sessions, images: Timings(32, [seconds[s.variant] for s in sessions])
    )
    assert bundle.fastest().variant == "int8"


def test_it_is_measured_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = stub(monkeypatch, fp32=0.4, fp16=0.2, int8=0.1)
    first = bundle.fastest()
    watch.seconds = {"fp32": 0.1, "fp16": 0.2, "int8": 0.4}
    assert load_bundle(bundle.folder).fastest() == first
    assert watch.asked == 1
    assert bundle.fastest(threads=1).variant == "fp32", "other threads are another question"
    monkeypatch.setattr(processor, "features", lambda: "SSE2")
    assert bundle.fastest().variant == "fp32", "another processor too"
    assert watch.asked == 3
    assert bundle.fastest(remembered=False).variant == "fp32"
    assert watch.asked == 4


@pytest.mark.parametrize("answer", ["passed", {"variant": "int8"}, GONE, UNKNOWN])
def test_a_memory_of_another_kind_is_none(
    bundle: Bundle, answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = stub(monkeypatch, fp32=0.1, fp16=0.2, int8=0.4)
    verdicts.remember(module._question(bundle, None, None), msgspec.to_builtins(answer))
    assert bundle.fastest().variant == "fp32"
    assert watch.asked == 1


def test_a_remembered_choice_is_checked_before_it_answers(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = Choice("int8-wrong", "onnxruntime", "", {}, {})
    verdicts.remember(module._question(bundle, None, None), msgspec.to_builtins(forged))
    with pytest.raises(CheckError, match="use --variant "):
        bundle.predict([IMAGE], variant="auto")


def test_where_none_holds_or_runs_it_says_why(
    bundle: Bundle, make_bundle: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = make_bundle(tmp_path / "wrong", wrong=("fp32",))
    with pytest.raises(
        CheckError, match=r"no variant of .* gives PyTorch's logits on this machine \(fp32 on onnxruntime: "
    ):
        wrong.session("auto")

    def absent() -> None:
        raise UsageError("ONNX Runtime is not installed; run: pip install 'ffl-deploy[cpu]' (or [gpu]).")

    monkeypatch.setattr("ffl_deploy.runtime.onnx_runtime.import_onnxruntime", absent)
    with pytest.raises(
        UsageError, match=r"can be run on this machine \(fp32 on onnxruntime: not run: ONNX Runtime is not"
    ):
        bundle.fastest()
    with pytest.raises(UsageError, match="no runtime 'onnxruntim'"):
        bundle.fastest("onnxruntim")


def test_a_changed_file_is_not_passed_over(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, fp32=0.4, fp16=0.2, int8=0.1)
    path = bundle.folder / "model.int8.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckError, match=r"model\.int8\.onnx was changed since export"):
        bundle.session("auto")


def test_every_file_is_tried_on_every_runtime_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERYWHERE", ("onnxruntime", "openvino"))
    first = msgspec.structs.replace(bundle.manifest.variants[2], name="fp32-openvino", runtime="openvino")
    engine = msgspec.structs.replace(
        first, name="fp32-engine", runtime="tensorrt", file="engines/fp32.engine"
    )
    more = Bundle(
        bundle.folder,
        msgspec.structs.replace(bundle.manifest, variants=[*bundle.manifest.variants, first, engine]),
    )
    tried = [f"{variant.name} {runtime}" for variant, runtime in module._combinations(more, None)]
    assert tried[:3] == ["fp32 onnxruntime", "fp32-openvino openvino", "fp32-engine tensorrt"]
    others = ("fp16", "int8", "int8-wrong")
    assert sorted(tried[3:]) == [
        f"{name} {runtime}" for name in others for runtime in ("onnxruntime", "openvino")
    ]
    only = [f"{variant.name} {runtime}" for variant, runtime in module._combinations(more, "openvino")]
    assert sorted(only) == [
        f"{name} openvino" for name in ("fp16", "fp32", "fp32-engine", "int8", "int8-wrong")
    ]


class Timer(Session):
    """Remembers the sizes of what it ran."""

    runtime = "timer"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, images: np.ndarray) -> Outputs:
        self.batches.append(len(images))
        return Outputs(images[:, 0, 0], images[:, 0, 0])


def test_sessions_run_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_SECONDS", 0.0)
    images = np.zeros((3, 2, 2, 3), np.uint8)
    sessions = [Timer(), Timer()]
    timings = module.timed(sessions, images)
    assert timings.batch == 32
    assert [len(taken) for taken in timings.seconds] == [3, 3]
    assert [session.batches for session in sessions] == [[1, 1] + [32] * 4] * 2
    monkeypatch.setattr(module, "RUN_SECONDS", 0.0)
    assert module.timed([Timer()], images).batch == 1, "a slow model gets fewer images"


def test_verify_says_which_and_why(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = stub(monkeypatch, fp32=0.4, fp16=0.2, int8=0.1)
    for asked in (1, 2):
        assert run_command(verify_main, [str(bundle.folder), "--variant", "auto"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].startswith(
            "auto: int8 on onnxruntime is the fastest that holds its gate here: 320 images/s"
        )
        assert lines[2].startswith("int8 on onnxruntime: 4 images at batches 1, 4")
        assert watch.asked == asked, "ffl-verify measures, whatever is remembered"
    assert run_command(verify_main, [str(bundle.folder), "--variant", "auot"]) == 2
    assert "Did you mean 'auto'?" in capsys.readouterr().err
