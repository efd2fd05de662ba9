"""docs/results.md says of the paper's claims what the stored comparison says."""

from __future__ import annotations

from pathlib import Path

import pytest

import benchmarks.results as results
from ffl_deploy.run_directory import write_json
from train.comparison import Against, Comparison, MethodResult, SeedPair, estimate


def method(name: str, strong: str, **accuracy: list[float]) -> MethodResult:
    values = {key.replace("_", " "): estimate(value) for key, value in accuracy.items()}
    against = Against(estimate([0.01, 0.02]), None, [SeedPair(0, 5, 3, 0.7), SeedPair(1, 6, 2, 0.3)])
    return MethodResult(name, ["resnet8"] * 2, strong, [0, 1], values, estimate([60.0, 61.0]), {"branch0": 1}, against, against)


def comparison() -> Comparison:
    ffl = method("ffl", "fused", fused=[0.40, 0.41], ensemble=[0.39, 0.40], branch0=[0.35, 0.36], mean_branch=[0.35, 0.36])
    vanilla = method("vanilla", "branch0", branch0=[0.34, 0.38], mean_branch=[0.34, 0.38])
    no_ekd = method("ffl-no-ekd", "fused", fused=[0.39, 0.39], ensemble=[0.39, 0.39], branch0=[0.3, 0.3], mean_branch=[0.3, 0.3])
    images = {"train": 49_000, "validation": 1_000, "test": 10_000}
    return Comparison("the command", "cifar100", 100, images, (32, 32), 4, "ffl", {}, [ffl, vanilla, no_ekd])


def test_claims_are_judged_by_their_intervals() -> None:
    text = "\n".join(results.account(comparison()))
    assert "the fused classifier is above the ensemble: +1.00 points (+1.00 to +1.00), holds." in text
    assert "a branch is above the same network alone: -0.50 points" in text
    assert text.endswith("undecided: the interval holds 0.")


def test_the_page_holds_the_comparison_and_its_ablations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "COMPARISON", tmp_path / "compare-cifar100.json")
    assert "nothing here says that FFL beats another method" in results.comparison_text()
    write_json(tmp_path / "compare-cifar100.json", comparison())
    methods, ablations = results.comparison_text().split("## What the parts of FFL bring")
    assert "    the command" in methods
    assert "| vanilla | resnet8 + resnet8 | branch0 | 36.00 ± 2.83 |" in methods
    assert "ffl-no-ekd" not in methods
    assert "| ffl-no-ekd | +1.50 [-4.85, 7.85] | no claim below 6 seeds | 11 / 5 | 0.7, 0.3 |" in ablations
