"""ffl-engine, and the engines that `--runtime tensorrt` builds at first use, on a stand-in for TensorRT that
computes what the file says."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.engine import main
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.manifest import MANIFEST
from ffl_deploy.runtime import tensorrt_cache
from tests.ffl_deploy.stub_tensorrt import VERSION, Cuda, install, own_environment

MakeBundle = Callable[..., Bundle]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    own_environment(monkeypatch)


@pytest.fixture
def cuda() -> Cuda:
    return Cuda()


@pytest.fixture
def trt(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return install(monkeypatch, cuda)


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """-> where engines are kept: nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ffl-deploy" / "engines"


@pytest.fixture
def bundle(make_bundle: MakeBundle, tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundles" / "tiny", golden_count=12)


def kept(engines: Path, suffix: str = ".engine") -> list[Path]:
    return sorted(engines.glob(f"*{suffix}"))


def test_an_engine_is_built_verified_measured_and_kept(
    bundle: Bundle, engines: Path, trt: ModuleType, cuda: Cuda, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, [str(bundle.folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("fp32 for NVIDIA Stub (compute capability 9.0, driver for CUDA 13.0)")
    assert said[1].startswith(f"built by tensorrt {VERSION} in ")
    assert "for batches 1, 8, 256 (" in said[1]
    assert said[1].endswith(f"kept in {engines}")
    assert said[2].startswith("fp32 on tensorrt: 16 images at batches 1, 7, 16: max logit difference ")
    assert said[2].endswith("top-1 agreement 100 %, fp32 gate passed")
    assert "ms for one image; images/s: " in said[3]
    assert [rate.split(" at ")[1] for rate in said[3].split(", ")] == ["batch 1", "batch 8", "batch 256"]

    assert stat.S_IMODE(engines.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in engines.iterdir()} == {0o600}
    (engine,) = kept(engines)
    entry = json.loads(engine.with_suffix(".json").read_text())
    assert entry["question"] == {
        "asks": "engine",
        "format": 1,
        "source": bundle.manifest.files["model.onnx"].sha256,
        "tensorrt": ["tensorrt", VERSION],
        "gpu": ["NVIDIA Stub", "9.0", "for CUDA 13.0"],
    }
    assert cuda.held == (0, 0, 0)


def test_predicting_builds_the_engine_once_and_finds_it_afterwards(
    bundle: Bundle, engines: Path, trt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = list(bundle.golden().images)
    expected = bundle.predict(images)
    for _ in range(2):
        found = load_bundle(bundle.folder).predict(images, runtime="tensorrt")
        assert [one.label for one in found] == [one.label for one in expected]
        np.testing.assert_allclose(found[3].logits, expected[3].logits, atol=1e-5)
    assert len(trt.built) == 1
    assert trt.built[0].profiles == [[1, 1, 1], [2, 8, 8], [9, 256, 256]]
    assert run_command(main, [str(bundle.folder), "--batches", "1,8"]) == 0, "builds it again"
    load_bundle(bundle.folder).predict(images, runtime="tensorrt")
    assert [config.profiles[-1] for config in trt.built] == [[9, 256, 256], [2, 8, 8]]
    assert len(kept(engines)) == 1


def test_auto_considers_an_engine_once_it_was_built(
    bundle: Bundle, engines: Path, trt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffl_deploy.fastest.EVERYWHERE", ("onnxruntime",))
    assert list(bundle.fastest().images_per_second) == ["fp32 on onnxruntime"]
    assert trt.built == [], "it does not build for minutes to find out"
    assert run_command(main, [str(bundle.folder)]) == 0
    assert set(bundle.fastest().images_per_second) == {"fp32 on onnxruntime", "fp32 on tensorrt"}
    assert len(trt.built) == 1


@pytest.mark.parametrize("change", ["source", "version", "capability", "driver", "flavour"])
def test_what_an_engine_depends_on_makes_another_one(
    change: str,
    bundle: Bundle,
    engines: Path,
    trt: ModuleType,
    cuda: Cuda,
    make_bundle: MakeBundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle.session(runtime="tensorrt")
    other = bundle
    if change == "source":
        other = make_bundle(tmp_path / "bundles" / "other", seed=3)
    elif change == "version":
        trt.__version__ = "10.14"
    elif change == "capability":
        cuda.capability = (8, 9)
    elif change == "driver":
        cuda.driver = 13010
    else:
        trt = install(monkeypatch, cuda, "tensorrt_rtx")
    load_bundle(other.folder).session(runtime="tensorrt")
    assert len(kept(engines)) == 2


@pytest.mark.parametrize("harm", ["changed", "no record", "a link", "open to others", "another format"])
def test_an_engine_that_cannot_be_trusted_is_built_again(
    harm: str, bundle: Bundle, engines: Path, trt: ModuleType, tmp_path: Path
) -> None:
    bundle.session(runtime="tensorrt")
    (engine,) = kept(engines)
    before = engine.read_bytes()
    if harm == "changed":
        engine.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    elif harm == "no record":
        engine.with_suffix(".json").unlink()
    elif harm == "a link":
        engine.rename(tmp_path / "elsewhere")
        engine.symlink_to(tmp_path / "elsewhere")
    elif harm == "open to others":
        engine.chmod(0o666)
    else:
        engine.with_suffix(".json").write_text('{"question": 3}')
    load_bundle(bundle.folder).session(runtime="tensorrt")
    assert len(trt.built) == 2
    assert (engine.read_bytes(), engine.is_symlink()) == (before, False)
    load_bundle(bundle.folder).session(runtime="tensorrt")
    assert len(trt.built) == 2


def test_an_engine_with_other_answers_is_refused_and_not_kept(
    make_bundle: MakeBundle,
    engines: Path,
    trt: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = make_bundle(tmp_path / "bundles" / "wrong", variants=("fp32", "fp16"), wrong=("fp16",))
    assert run_command(main, [str(wrong.folder), "--variant", "fp16"]) == 1
    said = capsys.readouterr()
    assert "variant fp16 of" in said.err
    assert "does not give PyTorch's logits on this machine with tensorrt" in said.err
    assert "use --variant fp32, which holds here." in said.err
    assert "gate passed" not in said.out
    assert kept(engines) == []
    assert len(trt.built) == 1, "to advise something no further engine is built"


def test_what_an_earlier_build_timed_serves_the_next(
    bundle: Bundle, engines: Path, trt: ModuleType, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle.session(runtime="tensorrt")
    make_bundle(tmp_path / "bundles" / "other", seed=3).session(runtime="tensorrt")
    assert [config.timings for config in trt.built] == [b"", b"timed"]
    assert [path.read_bytes() for path in kept(engines, ".timings")] == [b"timedtimed"]


def test_what_tensorrt_rtx_compiled_is_kept_for_the_next_process(
    bundle: Bundle, engines: Path, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = install(monkeypatch, cuda, "tensorrt_rtx")
    for _ in range(2):
        load_bundle(bundle.folder).session(runtime="tensorrt").close()
    assert trt.compiled == [b"compiled for this GPU"]
    assert [path.read_bytes() for path in kept(engines, ".kernels")] == [b"compiled for this GPU"]
    assert cuda.held == (0, 0, 0)


def test_two_first_uses_at_once_build_one_engine(bundle: Bundle, engines: Path, trt: ModuleType) -> None:
    together = threading.Barrier(3)

    def use(_: int) -> None:
        together.wait(10)
        load_bundle(bundle.folder).open(runtime="tensorrt").close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(use, range(3)))
    assert len(trt.built) == 1


@pytest.mark.parametrize("why", ["no home", "read-only", "full"])
def test_where_nothing_can_be_kept_an_engine_still_answers(
    why: str, bundle: Bundle, engines: Path, trt: ModuleType, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    if why == "no home":
        monkeypatch.setattr("ffl_deploy.private_cache.cache_home", lambda: None)
    elif why == "read-only":
        monkeypatch.setenv("XDG_CACHE_HOME", str(engines / "not" / "there"))
    else:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tensorrt_cache, "write_private", full)
    for built in (1, 2):
        session = load_bundle(bundle.folder).session(runtime="tensorrt")
        assert session.run(bundle.golden().images[:2]).logits.shape == (2, 3)
        assert len(trt.built) == built
    assert "cannot be kept" in caplog.text


def test_the_least_recently_used_make_room(
    bundle: Bundle, engines: Path, trt: ModuleType, make_bundle: MakeBundle, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    others = [make_bundle(tmp_path / "bundles" / str(seed), seed=seed) for seed in (1, 2)]
    bundle.open(runtime="tensorrt").close()
    others[0].open(runtime="tensorrt").close()
    for path in engines.iterdir():
        os.utime(path, (1, 1))
    bundle.open(runtime="tensorrt").close()  # used now
    monkeypatch.setattr(tensorrt_cache, "MAX_FILES", 6)
    others[1].open(runtime="tensorrt").close()
    assert len(trt.built) == 3
    bundle.open(runtime="tensorrt").close()
    assert len(trt.built) == 3, "was used last, and stayed"
    others[0].open(runtime="tensorrt").close()
    assert len(trt.built) == 4


def test_bad_input_is_one_sentence(
    bundle: Bundle, engines: Path, trt: ModuleType, cuda: Cuda, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def run(*flags: str) -> tuple[int, str]:
        code = run_command(main, [str(bundle.folder), *flags])
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "Traceback" not in said
        return code, said

    assert run("--variant", "fp23")[0] == 2
    code, said = run("--batches", "1,none")
    assert (code, "'1,none' is no list of batch sizes such as 1,8,64" in said) == (2, True)
    assert run("--batches", "0")[0] == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    code, said = run("--device", "2")
    assert (code, "there is no GPU 2 among the 2 of CUDA_VISIBLE_DEVICES=3,5" in said) == (2, True)
    assert run_command(main, [str(bundle.folder), "--device", "1"]) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    capsys.readouterr()
    (bundle.folder / "model.onnx").write_bytes(b"changed")
    code, said = run()
    assert (code, "was changed since export" in said) == (1, True)
    cuda.count = 0
    code, said = run()
    assert code == 1, "the file is looked at first"


def test_without_a_gpu_the_command_says_so_and_leaves_nothing(
    bundle: Bundle, engines: Path, trt: ModuleType, cuda: Cuda, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda.driver = 0
    assert run_command(main, [str(bundle.folder)]) == 2
    said = capsys.readouterr()
    assert "there is no NVIDIA driver on this machine, so no GPU to compute on" in said.err
    assert (said.out, engines.exists()) == ("", False)


def test_the_builders_refusal_is_the_error(
    bundle: Bundle, engines: Path, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, cuda, complaint="Int8 zero points have to be zero", builds=False)
    with pytest.raises(CheckError, match=r"tensorrt cannot build .*Int8 zero points have to be zero"):
        bundle.session(runtime="tensorrt")
    assert kept(engines) == []


def test_a_graph_of_a_static_batch_gets_an_engine_of_it(
    make_bundle: MakeBundle, engines: Path, trt: ModuleType, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    from ffl_deploy.files import sha256_of

    folder = make_bundle(tmp_path / "bundles" / "static").folder
    model = onnx.load(folder / "model.onnx")
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 5
    for entry in model.metadata_props:
        if entry.key == "ffl.contract":
            entry.value = json.dumps(json.loads(entry.value) | {"batch": 5})
    onnx.save(model, folder / "model.onnx")
    manifest = json.loads((folder / MANIFEST).read_text())
    digest, size = sha256_of(folder / "model.onnx"), (folder / "model.onnx").stat().st_size
    manifest["input"]["batch"] = 5
    manifest["variants"][0] |= {"sha256": digest, "bytes": size}
    manifest["files"]["model.onnx"] = {"sha256": digest, "bytes": size}
    (folder / MANIFEST).write_text(json.dumps(manifest))

    session = load_bundle(folder).session(runtime="tensorrt")
    assert trt.built[0].profiles == [[5, 5, 5]]
    images = load_bundle(folder).golden().images
    assert session.run(images[:3]).logits.shape == (3, 3)
    assert run_command(main, [str(folder), "--batches", "1,8"]) == 0


def test_a_bundles_engine_of_another_gpu_says_what_to_run(
    bundle: Bundle, engines: Path, trt: ModuleType, cuda: Cuda, tmp_path: Path
) -> None:
    from ffl_deploy.errors import OtherMachine

    record = json.loads(json.dumps({
        "flavour": "tensorrt", "version": VERSION, "compute_capabilities": ["8.9"],
        "profile": {"min": 1, "opt": 4, "max": 8}, "source": "model.onnx", "source_sha256": "0" * 64,
        "platform": "Linux x86_64", "build_seconds": 1.0, "log": [],
    }))  # fmt: skip
    folder = shutil.copytree(bundle.folder, tmp_path / "copy")
    (folder / "engines").mkdir()
    (folder / "engines" / "fp32.engine").write_bytes(b"{}\nmodel")
    from ffl_deploy.files import sha256_of

    listed = {"sha256": sha256_of(folder / "engines" / "fp32.engine"), "bytes": 8}
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["engines/fp32.engine"] = listed
    manifest["variants"].append({
        "name": "fp32-engine", "runtime": "tensorrt", "file": "engines/fp32.engine", **listed,
        "precision": {"stored": "fp32", "computed": "fp32"}, "details": {"engine": record},
    })  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        OtherMachine, match=rf"compute capability 8\.9, this GPU has 9\.0; .*ffl-engine {folder}"
    ):
        load_bundle(folder).session("fp32-engine")
    with pytest.raises(
        UsageError, match=r"variant fp32-engine of .* is a TensorRT engine, which onnxruntime does"
    ):
        load_bundle(folder).session("fp32-engine", "onnxruntime")
    assert run_command(main, [str(folder), "--variant", "fp32-engine"]) == 2


def test_the_provider_that_was_dropped_names_what_to_use(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="use --runtime tensorrt, which builds an engine of the same file"):
        bundle.session(runtime="onnxruntime-tensorrt")


def test_the_command_needs_no_torch_and_no_run(bundle: Bundle, engines: Path) -> None:
    """Here without a GPU: it gets as far as looking for one."""
    script = (
        "import sys\nfrom ffl_deploy.command import run_command\nfrom ffl_deploy.engine import main\n"
        "code = run_command(main, sys.argv[1:])\n"
        "print(code, [name for name in ('torch', 'onnx', 'export', 'train') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle.folder)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["2 []"]
    assert done.stderr.count("\n") == 1
