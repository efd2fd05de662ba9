"""The comparison with the official code takes its functions as they are, and times only what it says."""

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.learn_vs_official import Stored, arithmetic_table, learning_runs, learning_table
from benchmarks.official import Cifar100, endless, first_of_each, functions
from benchmarks.train_vs_official import WARM_UP, Blocks, table
from ffl_deploy.data.datasets import ArraySplit
from ffl_deploy.errors import UsageError

SCRIPT = """
raise SystemExit("the script itself was run")

def train(batches):
    return weight * sum(batches)

def other():
    pass
"""


def test_functions_come_without_running_the_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    names: dict[str, Any] = {"weight": 3}
    functions(tmp_path / "train.py", ["train"], names)
    assert names["train"]([1, 2]) == 9
    assert "other" not in names
    with pytest.raises(UsageError, match="another version"):
        functions(tmp_path / "train.py", ["train", "evaluate"], names)


def test_images_reach_the_official_transforms_as_pillow_images() -> None:
    Cifar100.images = {True: np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)}
    Cifar100.labels = {True: np.array([4, 5])}
    data = Cifar100("~/data", train=True, download=True, transform=lambda image: image)
    image, label = data[1]
    assert isinstance(image, Image.Image)
    assert np.asarray(image).tolist() == Cifar100.images[True][1].tolist()
    assert (label, len(data)) == (5, 2)


def test_a_subset_has_equally_many_of_each_class() -> None:
    labels = np.tile(np.arange(100), 5)
    split = ArraySplit(np.arange(500, dtype=np.uint8).repeat(3).reshape(500, 1, 1, 3), labels)
    few = first_of_each(split, 2)
    assert np.bincount(few.labels).tolist() == [2] * 100
    assert few.images[:, 0, 0, 0].tolist() == np.arange(200, dtype=np.uint8).tolist()


def test_an_endless_loader_starts_over() -> None:
    assert list(endless([1, 2, 3], 7)) == [1, 2, 3, 1, 2, 3, 1]


def test_a_block_times_its_steps_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\nstop\n"))
    block, numbers = Blocks(4, lambda: None), itertools.count()
    assert list(block(numbers)) == list(range(WARM_UP + 4))
    # One tick at the start, two for each request of a batch, one at the end.
    assert json.loads(capsys.readouterr().out) == {"seconds": 9 / 4, "loading": 1.0}
    with pytest.raises(SystemExit):
        next(block(numbers))


def test_tables_show_the_difference() -> None:
    shown = arithmetic_table({"official": [4.0, 2.0], "ours, fp32": [4.0, 2.002]})
    assert "| ours, fp32 | 4.00000 | 2.00200 | 1.0e-03 |" in shown
    accuracy = dict.fromkeys(("fused", "ensemble", "branch0", "branch1"), 0.125)
    shown = learning_table(
        {side: [{"loss": [4.0, 3.0], "test": [accuracy] * 2}] for side in ("official", "ours")}
    )
    assert "| 2 | ours | 0 | 3.000 | 12.50 | 12.50 | 12.50 | 12.50 |" in shown


def test_finished_runs_are_stored_at_once_and_not_repeated(tmp_path: Path) -> None:
    asked = []

    def job(seed: int) -> dict[str, Any]:
        asked.append(seed)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"loss": [float(seed)], "test": []}

    setting = {"date": "2026-11-24", "epochs": 1}
    with pytest.raises(KeyboardInterrupt):
        learning_runs({"official": job}, 2, Stored(tmp_path / "learn.json", setting))
    stored = Stored(tmp_path / "learn.json", setting | {"date": "2026-11-25"})
    learning_runs({"official": job}, 2, stored)
    assert asked == [0, 1, 1]
    assert [run["loss"] for run in stored.content["learning"]["official"]] == [[0.0], [1.0]]
    with pytest.raises(UsageError, match="another epochs"):
        Stored(tmp_path / "learn.json", setting | {"epochs": 2})


def test_the_throughput_table_has_medians() -> None:
    blocks = {"official": [{"seconds": s, "loading": 0.01} for s in (0.9, 1.0, 1.1)]}
    blocks["ours"] = [{"seconds": s, "loading": 0.002} for s in (0.4, 0.5, 0.6)]
    result = {
        "blocks": blocks,
        "precision": dict.fromkeys(blocks, "fp32"),
        "peak_mib": dict.fromkeys(blocks, 100),
    }
    assert "| official | fp32 | 1000 | 950-1050 | 128 | 1.0% | 100 MiB |" in table(result)
    assert "| ours | fp32 | 500 | 450-550 | 256 | 0.4% | 100 MiB |" in table(result)
