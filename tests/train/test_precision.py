"""The precision of a GPU is measured; here the passes are real and the clock is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import train.precision
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from train.config import OptimisationOptions, TrainConfig
from train.cuda_graph import Replayable, Work
from train.distributed import World
from train.machine import Place, choose_place
from train.methods import build_method
from train.precision import choice, fastest_precision, seconds_of_passes, some_batch


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"fp32": 2.0, "bf16": 1.0}, "bf16"),
        ({"fp32": 1.0, "bf16": 0.97}, "fp32"),  # not worth its rounding
        ({"fp32": 1.0, "bf16": 1.4}, "fp32"),
        ({"fp32": float("inf"), "fp16": 1.0}, "fp16"),  # fp32 takes more memory than there is
        ({"fp32": float("inf"), "bf16": float("inf")}, "fp32"),  # the run will say so
    ],
)
def test_the_fastest_is_taken_where_it_is_clearly_faster(seconds: dict[str, float], expected: str) -> None:
    assert choice(seconds) == expected


class Clock:
    """A device on which a pass takes `takes` seconds, or is out of memory."""

    def __init__(self, takes: float, captured: float | None = None, fails: str = "") -> None:
        self.now, self.takes, self.captured, self.fails = 0.0, takes, captured, fails

    def run(self, work: Work) -> list[torch.Tensor]:
        if self.fails:
            raise torch.OutOfMemoryError(self.fails) if "memory" in self.fails else RuntimeError(self.fails)
        self.now += self.takes
        return work()

    def capture(self, work: Work) -> Replayable:
        if self.captured is None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Replayable(work(), self.replay)

    def replay(self) -> None:
        self.now += self.captured or 0.0

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start


@pytest.fixture
def network() -> MutualNetwork:
    return MutualNetwork(NetworkConfig(("resnet8", "resnet8"), 3, 8, 8)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("device", "graphs", "expected"),
    [
        (Clock(3.0), False, 3.0),
        (Clock(3.0, captured=1.0), True, 1.0),
        (Clock(3.0), True, 3.0),  # what cannot be captured is timed as it is
        (Clock(3.0, fails="CUDA out of memory. Tried to allocate"), True, float("inf")),
    ],
    ids=["as it is", "captured", "not capturable", "out of memory"],
)
def test_timing_leaves_the_network_and_the_draws_alone(
    network: MutualNetwork, precision: str, device: Any, graphs: bool, expected: float
) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    draws, method, place = torch.get_rng_state(), build_method("ffl"), Place(torch.device("cpu"), precision)
    batch = some_batch(network, 6, place.device)
    assert batch.images.shape == (6, 3, 8, 8)
    assert seconds_of_passes(network, method, batch, place, device, graphs) == pytest.approx(expected)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert all(value.grad is None for value in network.parameters())
    assert torch.equal(torch.get_rng_state(), draws)


def test_another_error_than_memory_is_not_swallowed(network: MutualNetwork) -> None:
    place = Place(torch.device("cpu"), "fp32")
    batch = some_batch(network, 2, place.device)
    with pytest.raises(RuntimeError, match="illegal"):
        seconds_of_passes(network, build_method("ffl"), batch, place, Clock(1.0, fails="illegal"), False)


def test_the_choice_is_told_and_made_for_the_batch_of_one_process(
    network: MutualNetwork, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, bool]] = []

    def measured(*arguments: Any) -> float:
        asked.append((len(arguments[2].images), arguments[5]))
        return {"fp32": 0.004, "bf16": 0.002}[arguments[3].precision]

    monkeypatch.setattr(train.precision, "seconds_of_passes", measured)
    monkeypatch.setattr(train.precision, "candidates", lambda device: ("fp32", "bf16"))
    monkeypatch.setattr(train.precision, "Cuda", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    config = TrainConfig(optimisation=OptimisationOptions(batch_size=24, accumulate=2))
    place = Place(torch.device("cpu"), "bf16")
    assert fastest_precision(network, build_method("ffl"), config, place) == "bf16"
    assert asked == [(12, False)] * 2
    assert "fp32 4.00 ms, bf16 2.00 ms; training in bf16." in capsys.readouterr().err


def test_choose_place_asks_on_a_gpu_and_for_auto_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    gpu = torch.device("cuda", 0)
    assert choose_place("auto", gpu, World(), lambda place: "fp32").precision == "fp32"
    assert choose_place("auto", gpu, World()).precision == "bf16"
    for wanted in ("fp32", "bf16", "fp16"):
        assert choose_place(wanted, gpu, World(), lambda place: pytest.fail("measured")).precision == wanted
