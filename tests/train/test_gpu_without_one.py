"""What a GPU run does, as far as a CPU can show it: on fake tensors, with switches read back,
with errors put in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import train.build
import train.finish
import train.machine
import train.nvidia
import train.session
from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import ArraySplit, ImageData
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from ffl_deploy.preprocessing import Preprocessing
from ffl_deploy.run_directory import load_run
from train.build import converted, held_on_device
from train.config import DataOptions, MachineOptions, TrainConfig
from train.distributed import World
from train.machine import Place, choose_device, resources_in_one_sentence
from train.methods import METHODS
from train.run import main

TrainTiny = Callable[..., Path]


@contextmanager
def tf32() -> Iterator[None]:
    """As choose_device sets a GPU up: fp32 in 10 bits of mantissa."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def switches() -> tuple[bool, str]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def test_full_precision_is_without_tf32_and_ends_with_the_block() -> None:
    with tf32():
        with Place(torch.device("cpu"), "bf16").exact() as exact:
            assert (exact.precision, switches()) == ("fp32", (False, "highest"))
        assert switches() == (True, "high")
        with pytest.raises(ValueError, match="x"), Place(torch.device("cpu"), "bf16").exact():
            raise ValueError("x")
        assert switches() == (True, "high")


def test_the_test_set_is_read_without_tf32_and_the_reference_on_the_cpu(
    train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TF32, logits are 1e-3 of their standard deviation off, and a run of a GPU could not be exported:
    the gate is 1e-4."""
    seen: dict[str, Any] = {}
    predictions, logits_of = train.finish.predictions, train.finish.logits_of

    def watched_predictions(network: nn.Module, *arguments: Any) -> Any:
        seen["predictions"] = (arguments[-1].precision, switches())
        return predictions(network, *arguments)

    def watched_logits(network: nn.Module, images: torch.Tensor) -> Any:
        seen["device"] = {images.device.type, *(value.device.type for value in network.parameters())}
        seen["compiled"] = network._compiled_call_impl
        return logits_of(network, images)

    monkeypatch.setattr(train.finish, "predictions", watched_predictions)
    monkeypatch.setattr(train.finish, "logits_of", watched_logits)
    with tf32():
        train_tiny("run", "--epochs", "1")
    assert seen == {"predictions": ("fp32", (False, "highest")), "device": {"cpu"}, "compiled": None}


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "timm:resnet18", "resnet8"])
def test_synchronised_batch_statistics_change_nothing_else(name: str) -> None:
    """torch's own conversion drops the activations of timm's layers that normalise and activate."""
    torch.manual_seed(0)
    network = MutualNetwork(NetworkConfig((name, name), 3, 32, 32))
    images = torch.randn(2, 3, 32, 32)
    before = {key: value.clone() for key, value in network.eval()(images).classifiers().items()}
    names = list(network.state_dict())
    network = converted(network)
    assert [type(module) for module in network.modules() if type(module) is nn.BatchNorm2d] == []
    assert list(network.state_dict()) == names
    for key, value in network.eval()(images).classifiers().items():
        torch.testing.assert_close(value, before[key], rtol=1e-4, atol=1e-5)


def test_a_conversion_that_changes_the_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.layers import norm_act

    monkeypatch.setattr(norm_act, "convert_sync_batchnorm", torch.nn.SyncBatchNorm.convert_sync_batchnorm)
    network = MutualNetwork(NetworkConfig(("timm:mobilenetv3_small_050",) * 2, 3, 32, 32))
    with pytest.raises(CheckError, match="--sync-batchnorm would change what"):
        converted(network)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors"),
            "out of memory (CUDA error: out of memory)",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "smaller --batch-size",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "smaller --batch-size"),
        (
            torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore"),
            "the GPU failed (CUDA error: an",
        ),
        (
            torch.AcceleratorError("CUDA error: no kernel image is available for execution"),
            "--resume, or with --device cpu",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "the GPU failed (cuDNN error"),
    ],
)
def test_errors_of_a_gpu_are_one_sentence(error: Exception, sentence: str) -> None:
    with pytest.raises(CheckError) as caught, resources_in_one_sentence(MachineOptions()):
        raise error
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@dataclass
class Driver:
    """The library of a driver that runs CUDA up to `version` (1000 major + 10 minor), and starts with
    `started`."""

    version: int
    started: int = 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0

    def cuInit(self, flags: int) -> int:
        return self.started

    def cuGetErrorName(self, code: int, name: Any) -> int:
        name._obj.value = {802: b"CUDA_ERROR_SYSTEM_NOT_READY"}[code]
        return 0


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with an NVIDIA driver, as far as choose_device asks."""

    def pretend(
        available: bool,
        capability: tuple[int, int] = (8, 0),
        built: bool = True,
        driver: Driver | None = None,
        hidden: str | None = None,
    ) -> None:
        cuda = torch.cuda
        monkeypatch.setattr(train.nvidia, "library", lambda: driver)
        monkeypatch.setattr(train.nvidia, "driver_is_loaded", lambda: True)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if hidden is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        monkeypatch.setattr(cuda, "is_available", lambda: available)
        monkeypatch.setattr(cuda, "device_count", lambda: 1)
        monkeypatch.setattr(cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_120"])
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
        monkeypatch.setattr(cuda, "set_device", lambda device: None)
        monkeypatch.setattr(train.machine, "driver_is_loaded", lambda: True)
        for name in ("benchmark",):
            monkeypatch.setattr(torch.backends.cudnn, name, False)

    return pretend


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
def test_a_gpu_that_this_torch_has_code_for_is_taken(
    pretended: Callable[..., None], capability: tuple[int, int]
) -> None:
    pretended(True, capability)
    precision = torch.get_float32_matmul_precision()
    try:
        assert choose_device(MachineOptions(), World()) == torch.device("cuda", 0)
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (
            {"available": True, "capability": (7, 0)},
            "has no code for this GPU's compute capability 7.0 (it has sm_75",
        ),
        ({"available": True, "capability": (6, 0)}, "has no code for this GPU's compute capability 6.0"),
        (
            {"available": False, "driver": Driver(12080)},
            "the NVIDIA driver is too old for the CUDA 13.0 of this",
        ),
        ({"available": False, "driver": Driver(12080)}, "(it runs up to CUDA 12.8); update it"),
        (
            {"available": False, "driver": Driver(13000, 802)},
            "CUDA does not start (CUDA_ERROR_SYSTEM_NOT_READY)",
        ),
        (
            {"available": False, "driver": Driver(13010, 100)},
            "the NVIDIA driver finds no GPU; ask nvidia-smi",
        ),
        (
            {"available": False, "driver": Driver(13010), "hidden": "7"},
            "CUDA_VISIBLE_DEVICES=7 leaves no NVIDIA",
        ),
        (
            {"available": False, "driver": None},
            "libcuda.so.1 is not found; start the container with its GPUs",
        ),
        ({"available": False, "built": False}, "this torch is built without CUDA"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_told_and_auto_takes_the_cpu(
    pretended: Callable[..., None], machine: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended(**machine)
    assert choose_device(MachineOptions(device="auto"), World()) == torch.device("cpu")
    assert reason in capsys.readouterr().err
    with pytest.raises(UsageError) as caught:
        choose_device(MachineOptions(device="cuda"), World())
    assert reason in str(caught.value)


def test_a_gpu_that_is_lost_before_training_starts_is_a_sentence(
    pretended: Callable[..., None],
    tiny_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretended(True)

    def lost(device: object) -> None:
        raise torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "set_device", lost)
    assert run_command(main, [*tiny_flags, "--out", str(tmp_path / "run"), "--device", "cuda"]) == 1
    assert "the GPU failed (CUDA error: CUDA-capable device(s) is/are busy" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_fewer_gpus_than_processes_is_a_sentence(pretended: Callable[..., None]) -> None:
    pretended(True)
    with pytest.raises(UsageError, match="2 processes but 1 GPUs; lower --nproc-per-node"):
        choose_device(MachineOptions(), World(1, 2, 1))


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_sets_what_torch_asks_for(
    wanted: bool, pretended: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended(True)
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", "")
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG")
    precision = torch.get_float32_matmul_precision()
    try:
        choose_device(MachineOptions(deterministic=wanted), World())
        assert torch.are_deterministic_algorithms_enabled() is wanted
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is wanted
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(precision)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_an_operation_without_a_deterministic_form_is_a_sentence() -> None:
    with pytest.raises(UsageError) as caught, resources_in_one_sentence(MachineOptions(deterministic=True)):
        raise RuntimeError(
            "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off"
        )
    assert str(caught.value).startswith("--deterministic: adaptive_max_pool2d_backward_cuda has no determin")


def test_images_on_a_gpu_are_counted_as_they_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded by 4 pixels, images of 32 take 1.56 times their bytes."""
    split = ArraySplit(np.zeros((100, 32, 32, 3), np.uint8), np.zeros(100, np.int64))
    data = ImageData(
        "noise", ("a", "b"), Preprocessing(32, 32), (128.0,) * 3, (64.0,) * 3, split, split, split
    )
    config = TrainConfig(data=DataOptions(augment="crop", crop_padding=4))
    place = Place(torch.device("cuda", 0), "fp32")
    for free, held in ((4 * 100 * 3 * 40 * 40, True), (4 * 100 * 3 * 40 * 40 - 4, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert held_on_device(config, data, place) is held


def test_a_step_never_waits_for_the_gpu() -> None:
    wanted = ["ffl:fp32", *(f"{name}:bf16" for name in METHODS)]
    command = [sys.executable, "-m", "tests.train.gpu_waits", *wanted]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    copies = json.loads(done.stdout)
    assert list(copies) == wanted
    for name, found in copies.items():
        assert found["blocking"] == [], name
        assert found["free"] > 0, name  # the draws went over, so copies are seen


def test_seeding_a_step_asks_no_other_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.randomness import seed_everything

    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every kind of device is visited"))
    calls: list[int] = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_initialized=lambda: True, manual_seed=calls.append))
    value = seed_everything(3, "step", 5)
    drawn = torch.rand(3)
    assert calls == [value]
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(value)))


NODE = """
import os, sys
os.makedirs(os.environ["RANK"], exist_ok=True)
os.chdir(os.environ["RANK"])  # a machine of its own, with a disk of its own
import train.loop
accuracies, epochs = train.loop.accuracies, []
def falling(*arguments):  # so that the best weights are those of the first epoch
    epochs.append(1)
    return {name: 1 / len(epochs) for name in accuracies(*arguments)}
train.loop.accuracies = falling
from train.run import main
from ffl_deploy.command import run_command
sys.exit(run_command(main, sys.argv[1:]))
"""


def test_machines_without_a_common_disk_test_the_best_weights_and_refuse_to_resume_apart(
    tiny_flags: list[str], tmp_path: Path
) -> None:
    """Only the main process writes checkpoints. The others used to go on with their last weights,
    in silence."""
    script = tmp_path / "node.py"
    script.write_text(NODE)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}

    def launch(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launcher, *flags], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    flags = [flag if not Path(flag).exists() else str(Path(flag).resolve()) for flag in tiny_flags]
    done = launch(*flags, "--epochs", "3", "--lr", "0.5", "--out", "run")
    assert done.returncode == 0, done.stderr
    run = load_run(tmp_path / "0" / "run")
    assert json.loads((run.folder / "summary.json").read_text())["best_epoch"] == 1
    stored = np.load(run.folder / "test_predictions.npz")
    for name in ("fused", "branch0"):
        best, last = (run.reference(checkpoint, name)[2] for checkpoint in ("best", "last"))
        assert not np.array_equal(best, last)
        assert np.array_equal(stored[name][run.reference_rows()], best.argmax(axis=1))

    (run.folder / "summary.json").unlink()
    shutil.copytree(run.folder, tmp_path / "1" / "run", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "1" / "run" / "checkpoints")
    again = launch("--resume", "run")
    assert again.returncode != 0
    assert "do not find the same checkpoint" in again.stderr
    assert 'loop.py", line' not in again.stderr  # torchrun prints a traceback of its own, ours is a sentence
