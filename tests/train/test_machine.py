"""Device and precision of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.exc

import train.machine
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from ffl_deploy.run_directory import CONFIG, load_run
from train.build import check_small_size
from train.config import DataOptions, MachineOptions, ModelOptions, TrainConfig
from train.distributed import World
from train.machine import Place, bf16_speed_up, choose_place, require_possible, resources_in_one_sentence

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("speed_up", "expected"), [(0.0, "fp32"), (0.6, "fp32"), (1.1, "fp32"), (1.3, "bf16"), (5.0, "bf16")]
)
def test_a_cpu_trains_in_bf16_where_that_is_faster(
    speed_up: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.machine, "bf16_speed_up", lambda: speed_up)
    assert choose_place("auto", CPU, World()).precision == expected


def test_a_precision_that_was_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.machine, "bf16_speed_up", lambda: pytest.fail("measured"))
    assert choose_place("bf16", CPU, World()).precision == "bf16"
    with pytest.raises(UsageError, match="--precision fp16 needs a GPU"):
        require_possible(MachineOptions(precision="fp16"), CPU, World())


def test_bf16_is_not_tried_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert bf16_speed_up() == 0


def test_measuring_leaves_the_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert bf16_speed_up() > 0
    assert torch.equal(torch.rand(4), expected)


def test_a_resumed_run_keeps_its_precision(
    train_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train_tiny("run", "--epochs", "1", "--precision", "auto")
    content = json.loads((folder / CONFIG).read_text())
    content["toolchain"]["precision"] = "bf16"
    content["options"]["optimisation"]["epochs"] = 2
    (folder / CONFIG).write_text(json.dumps(content))
    (folder / "summary.json").unlink()
    used = []
    run = train.session.Trainer.run
    monkeypatch.setattr(
        train.session.Trainer, "run", lambda trainer: used.append(trainer.place.precision) or run(trainer)
    )
    monkeypatch.setattr(train.machine, "bf16_speed_up", lambda: 0.0)
    train_tiny("run", "--resume", str(folder))
    assert used == ["bf16"]
    assert load_run(folder).config.options["machine"]["precision"] == "auto"


def test_a_size_that_the_network_cannot_take_is_refused() -> None:
    network = MutualNetwork(NetworkConfig(("vgg16_bn",), 3, 32, 32, fusion=None))
    config = TrainConfig(data=DataOptions(small_size=16), model=ModelOptions(branches=("vgg16_bn",)))
    check_small_size(config, network, Place(CPU, "fp32"))
    config = replace(config, data=DataOptions(small_size=8))
    with pytest.raises(UsageError, match=r"vgg16_bn cannot take images of 8 pixels .*larger --small-size"):
        check_small_size(config, network, Place(CPU, "fp32"))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.18 GiB of "
                "which 1.47 GiB is free. If reserved but unallocated memory is large try setting ..."
            ),
            "out of memory (CUDA out of memory. Tried to allocate 20.00 GiB); use",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            "--accumulate 2",
        ),
        (
            torch._dynamo.exc.TorchDynamoException("InvalidCxxCompiler: none found"),
            "--compile failed (InvalidCxxCompiler",
        ),
    ],
)
def test_missing_memory_or_compiler_is_one_sentence(error: Exception, sentence: str) -> None:
    with pytest.raises(CheckError) as caught, resources_in_one_sentence(MachineOptions(compile=True)):
        raise error
    assert sentence in str(caught.value)


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="a bug"), resources_in_one_sentence(MachineOptions()):
        raise RuntimeError("a bug")
