"""cuDNN tries out its algorithms where that pays: for the shape of most steps of a long run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import train.loop
import train.session
from train.config import MachineOptions
from train.data.batches import Batch
from train.loop import Trainer
from train.machine import SEARCH_FROM, Place, searches

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def flag_is_as_it_was() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    yield
    assert torch.backends.cudnn.benchmark is before


@pytest.mark.parametrize(
    ("device", "deterministic", "steps", "expected"),
    [
        (GPU, False, SEARCH_FROM, True),
        (GPU, False, SEARCH_FROM - 1, False),
        (GPU, True, SEARCH_FROM, False),
        (CPU, False, SEARCH_FROM, False),
    ],
)
def test_long_runs_on_a_gpu_search(
    device: torch.device, deterministic: bool, steps: int, expected: bool
) -> None:
    assert searches(MachineOptions(deterministic=deterministic), device, steps) is expected


@pytest.mark.parametrize("wanted", [True, False])
def test_usual_steps_search_and_nothing_else(
    wanted: bool, train_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """54 images in steps of 20, each in two halves: the last one of an epoch has 14."""
    found: dict[str, set[tuple[int, bool]]] = {"steps": set(), "validation": set()}
    ready = Trainer.get_ready

    def watched(trainer: Trainer) -> None:
        ready(trainer)
        take = trainer.take_step

        def step(batches: list[Batch], frozen: object) -> object:
            found["steps"] |= {(len(batch.labels), torch.backends.cudnn.benchmark) for batch in batches}
            return take(batches, frozen)  # type: ignore[arg-type]

        trainer.take_step = step  # type: ignore[assignment]

    accuracies = train.loop.accuracies

    def validated(*arguments: object) -> object:
        found["validation"].add((0, torch.backends.cudnn.benchmark))
        return accuracies(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "get_ready", watched)
    monkeypatch.setattr(train.loop, "accuracies", validated)
    monkeypatch.setattr(train.session, "searches", lambda *_: wanted)
    train_tiny("run", "--epochs", "2", "--batch-size", "20", "--accumulate", "2")
    assert found == {"steps": {(10, wanted), (7, False)}, "validation": {(0, False)}}


def test_a_place_searches_only_in_the_block() -> None:
    place = Place(CPU, "fp32", searches=True)
    with place.searching():
        assert torch.backends.cudnn.benchmark
        with place.searching(False):
            assert not torch.backends.cudnn.benchmark
    with Place(CPU, "fp32").searching():
        assert not torch.backends.cudnn.benchmark
