"""Steps as CUDA graphs, as far as a CPU can show it: recorded.py stands for the graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import train.loop
from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import Interrupted, UsageError
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from tests.train.recorded import Recording
from tests.train.test_loop import assert_same_run, stop_after, weights
from train.config import MachineOptions, OptimisationOptions
from train.cuda_graph import TIMED, WARM, GraphedStep, graphs_wanted
from train.data.batches import Batch
from train.distributed import World
from train.ema import MovingAverage
from train.machine import Place, require_possible
from train.methods import METHODS, Method, build_method
from train.optimizer import build_optimizer
from train.schedule import learning_rate
from train.step import Step

CPU = torch.device("cpu")
TrainTiny = Callable[..., Path]


def build_step(method: str = "ffl", precision: str = "fp32", ema: float = 0.0, **changes: Any) -> Step:
    torch.manual_seed(0)
    chosen = build_method(method)
    branches = chosen.branches_for(("resnet8", "resnet8"))
    joined = {"fusion": chosen.fusion, "aggregator": chosen.aggregator}
    scaled = chosen.scales_trunk_gradient
    network = MutualNetwork(NetworkConfig(branches, 5, 8, 8, scale_trunk_gradient=scaled, **joined))
    network = network.train().to(memory_format=torch.channels_last)
    options = OptimisationOptions(lr=0.05, **changes)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=1024.0, growth_interval=3)
    average = MovingAverage(network, ema) if ema else None
    place, optimizer = Place(CPU, precision), build_optimizer(network, options)
    return Step(network, network, chosen, optimizer, scaler, average, place, options.clip, on_device=True)


def batches(number: int, parts: int = 1) -> list[Batch]:
    """The micro-batches of step `number`; every third one is smaller, as the last of an epoch."""
    draws = torch.Generator().manual_seed(number)
    count = 6 if number % 3 == 2 else 10
    images = torch.randn(count, 3, 8, 8, generator=draws)
    labels = torch.randint(5, (count,), generator=draws)
    cuts = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
    return [Batch(some, their, their) for some, their in cuts]


def trained(step: Step, take: Callable[..., list[Tensor]], steps: int, parts: int = 1) -> list[Tensor]:
    """-> what was measured, after `steps` steps with another learning rate, ramp and seed each."""
    rows = []
    for number in range(steps):
        torch.manual_seed(number)  # as seed_everything does: dropout is a function of the step
        step.set(learning_rate(number, steps, OptimisationOptions(lr=0.05)), 0.1 + number / steps)
        frozen = step.method.frozen(step.network, number / steps, number)  # type: ignore[arg-type]
        rows += take(batches(number, parts), frozen)
    return rows


def assert_same_state(found: Step, expected: Step) -> None:
    pairs = zip(Recording(found).state(), Recording(expected).state(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"ema": 0.9, "clip": 0.5},
    {"optimizer": "adamw"},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"precision": "fp16", "clip": 0.5},
]


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        *(({"method": name}, 1) for name in METHODS),
        *((setting, parts) for setting in SETTINGS for parts in (1, 2)),
    ],
    ids=str,
)
def test_a_captured_step_equals_the_step_as_it_is(setting: dict[str, Any], parts: int) -> None:
    """Learning rate, ramp-up and draws are those of each step, not those of the capture."""
    plain, captured = build_step(**setting), build_step(**setting)
    device = Recording(captured)
    graphed = GraphedStep(captured, device, choose=False, say=pytest.fail)
    expected, found = trained(plain, plain, 15, parts), trained(captured, graphed, 15, parts)
    assert device.replays >= 4
    assert device.captures >= 2  # both sizes of a step
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert_same_state(captured, plain)
    assert captured.names == plain.names
    if captured.ema is not None:
        assert captured.ema.n_averaged == 15


def test_a_learning_rate_on_the_device_moves_the_weights_as_one_of_the_host() -> None:
    on_device, on_host = build_step(), build_step()
    on_host.on_device, on_host.rate, on_host.ramp = False, 0.0, 0.0
    expected, found = trained(on_host, on_host, 6), trained(on_device, on_device, 6)
    assert isinstance(on_device.rate, Tensor)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("captured_takes", "used"), [(2.0, True), (7.0, False)])
def test_auto_keeps_what_measures_faster_and_says_so(captured_takes: float, used: bool) -> None:
    step, said = build_step("vanilla"), []
    device = Recording(step, plain=5.0, captured=captured_takes)
    graphed = GraphedStep(step, device, choose=True, say=said.append)
    plain = build_step("vanilla")
    steps = 2 * (WARM + 2 * TIMED)
    found, expected = trained(step, graphed, steps), trained(plain, plain, steps)
    assert said == [
        f"a step takes {1e3 * captured_takes:.2f} ms as a CUDA graph and 5000.00 ms without: "
        f"training goes on {'with it' if used else 'without it'}."
    ]
    assert graphed.used is used
    ran, replays = device.ran, device.replays
    trained(step, graphed, 6)
    assert (device.ran - ran, device.replays - replays) == ((0, 6) if used else (0, 0))
    for _ in range(WARM + 2):  # a shape that comes later, as that of --small-size's end
        graphed([Batch(torch.randn(4, 3, 8, 8), *2 * [torch.arange(4)])], [])
    assert (device.ran - ran, device.replays - replays) == ((WARM, 8) if used else (0, 0))
    assert len(said) == 1
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


class Asking(Method):
    """Losses that ask the device for a number, which a capture does not allow."""

    def losses(self, outputs: Any, labels: Tensor, ramp: float | Tensor) -> dict[str, Tensor]:
        loss = torch.nn.functional.cross_entropy(outputs.branches[0], labels)
        return {"ce/branch0": loss * (2.0 if loss.item() > 0 else 1.0)}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_cannot_be_captured_goes_on_without_and_loses_nothing(precision: str) -> None:
    plain, step, said = build_step(precision=precision), build_step(precision=precision), []
    plain.method = step.method = Asking()
    device = Recording(step)
    graphed = GraphedStep(step, device, choose=False, say=said.append)
    found, expected = trained(step, graphed, 12), trained(plain, plain, 12)
    assert (device.captures, device.replays, device.ran) == (1, 0, 5)  # by itself from then on
    assert len(said) == 1
    assert said[0].startswith("training goes on without a CUDA graph: this step cannot be captured (CUDA er")
    assert "\n" not in said[0]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert_same_state(step, plain)


@pytest.fixture
def captured_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Runs of this process take their steps as a GPU would."""
    made: list[Recording] = []

    def graphed(step: Step, options: MachineOptions, place: Place, say: Callable[[str], None]) -> Any:
        if options.cuda_graph == "off":
            return step
        made.append(Recording(step))
        return GraphedStep(step, made[-1], options.cuda_graph == "auto", say)

    monkeypatch.setattr(train.loop, "graphed", graphed)
    monkeypatch.setattr(train.loop, "Step", lambda *parts: Step(*parts[:-1], on_device=True))
    monkeypatch.setattr("train.session.require_possible", lambda *_: None)
    return made


def test_a_run_of_captured_steps_is_the_run_of_steps_as_they_are_also_when_it_is_resumed(
    captured_on_cpu: list[Recording], train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--epochs", "3", "--ema", "0.9", "--small-size", "6"]
    expected = train_tiny("plain", *flags, "--cuda-graph", "off")
    captured = train_tiny("captured", *flags, "--cuda-graph", "on")
    with stop_after(monkeypatch, 9), pytest.raises(Interrupted):
        train_tiny("stopped", *flags, "--cuda-graph", "on")
    stopped = train_tiny("stopped", "--resume", str(expected.parent / "stopped"))
    for run in (captured, stopped):
        assert_same_run(run, expected)
        found, averages = weights(run, "ema"), weights(expected, "ema")
        assert all(torch.equal(found[name], value) for name, value in averages.items())
    assert captured_on_cpu[0].replays > 0


@pytest.mark.parametrize("taught_by", ["run", "ema"])
def test_a_teacher_on_the_device_is_captured_with_the_step(
    taught_by: str, captured_on_cpu: list[Recording], train_tiny: TrainTiny
) -> None:
    teacher = train_tiny("teacher", "--epochs", "1", "--cuda-graph", "off") if taught_by == "run" else "ema"
    flags = ["--epochs", "3", "--ema", "0.9", "--teacher", str(teacher)]
    expected = train_tiny("plain", *flags, "--cuda-graph", "off")
    assert_same_run(train_tiny("captured", *flags, "--cuda-graph", "on"), expected)
    assert captured_on_cpu[0].replays > 0


def test_a_teacher_on_the_host_and_answers_that_are_kept_are_not_captured(
    captured_on_cpu: list[Recording], train_tiny: TrainTiny, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """A bundle answers by another library; kept answers are read from the disk."""
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    for split, name in itertools.product(("train", "test"), tiny_bundle.manifest.classes):
        folder = tmp_path / "images" / split / name
        folder.mkdir(parents=True)
        for number, pixels in enumerate(images):
            Image.fromarray(pixels).save(folder / f"{number}.png")
    of_bundle = ["--data", str(tmp_path / "images"), "--teacher", str(tiny_bundle.folder)]
    train_tiny("by-a-bundle", *of_bundle, "--cuda-graph", "on")
    teacher = train_tiny("teacher", "--epochs", "1", "--cuda-graph", "off")
    few = ["--no-flip", "--crop-padding", "0"]
    train_tiny("kept", *few, "--teacher", str(teacher), "--cuda-graph", "on")
    assert captured_on_cpu == []


def test_a_graph_is_asked_for_where_there_can_be_one() -> None:
    gpu, cpu = Place(torch.device("cuda", 0), "fp32"), Place(CPU, "fp32")
    assert graphs_wanted(MachineOptions(), gpu)
    assert not graphs_wanted(MachineOptions(cuda_graph="off"), gpu)
    assert not graphs_wanted(MachineOptions(), cpu)
    several = Place(torch.device("cuda", 0), "fp32", World(0, 2, 0))
    assert not graphs_wanted(MachineOptions(), several)
    on = MachineOptions(cuda_graph="on")
    require_possible(on, gpu.device, gpu.world)
    with pytest.raises(UsageError, match="--cuda-graph on needs an NVIDIA GPU"):
        require_possible(on, cpu.device, cpu.world)
    with pytest.raises(UsageError, match="--cuda-graph on is for one process"):
        require_possible(on, several.device, several.world)
