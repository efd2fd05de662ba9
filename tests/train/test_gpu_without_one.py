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


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with an NVIDIA driver, as far as choose_device asks."""

    def pretend(available: bool, capability: tuple[int, int] = (8, 0), built: bool = True) -> None:
        cuda = torch.cuda
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
        ({"available": False}, "the NVIDIA driver is too old for the CUDA"),
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["ffl", "one"])
def test_a_step_never_waits_for_the_gpu(method: str, precision: str) -> None:
    assert method in METHODS
    command = [sys.executable, "-m", "tests.train.gpu_waits", method, precision]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    copies = json.loads(done.stdout)
    assert copies["blocking"] == []
    assert copies["free"] > 0  # the draws went over, so copies are seen


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
