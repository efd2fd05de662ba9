"""docs/results.md says of the paper's claims what the stored comparison says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from benchmarks.page.comparison_text import account, comparison_text
from benchmarks.page.results import main
from benchmarks.page.teacher import collect, compared, text, verdict
from ffl_deploy.errors import UsageError
from ffl_deploy.files import write_json
from ffl_deploy.run_directory import PREDICTIONS, Run
from train.comparison.results import Against, Comparison, MethodResult, SeedPair, estimate


def method(name: str, strong: str, **accuracy: list[float]) -> MethodResult:
    values = {key.replace("_", " "): estimate(value) for key, value in accuracy.items()}
    against = Against(estimate([0.01, 0.02]), None, [SeedPair(0, 5, 3, 0.7), SeedPair(1, 6, 2, 0.3)])
    parameters = {strong: 2, "branch0": 1, "training": 3}
    return MethodResult(
        name, ["resnet8"] * 2, strong, [0, 1], values, estimate([60.0, 61.0]), parameters, against, against
    )


def with_seeds(result: MethodResult, count: int) -> MethodResult:
    return msgspec.structs.replace(result, seeds=list(range(count)))


def comparison() -> Comparison:
    ffl = method(
        "ffl",
        "fused",
        fused=[0.40, 0.41],
        ensemble=[0.39, 0.40],
        branch0=[0.35, 0.36],
        mean_branch=[0.35, 0.36],
    )
    vanilla = method("vanilla", "branch0", branch0=[0.34, 0.38], mean_branch=[0.34, 0.38])
    no_ekd = method(
        "ffl-no-ekd",
        "fused",
        fused=[0.39, 0.39],
        ensemble=[0.39, 0.39],
        branch0=[0.3, 0.3],
        mean_branch=[0.3, 0.3],
    )
    images = {"train": 49_000, "validation": 1_000, "test": 10_000}
    return Comparison("the command", "cifar100", 100, images, (32, 32), 4, "ffl", {}, [ffl, vanilla, no_ekd])


def test_two_seeds_decide_no_claim() -> None:
    text = account(comparison())
    above = (
        "- the fused classifier is above the ensemble: +1.00 [1.00, 1.00], above in 2 of 2 seeds; no claim "
        "below 6 seeds."
    )
    assert above in text
    assert (
        "- the mean branch is above the same network trained alone: -0.50 [-19.56, 18.56], above in 1 of 2 "
        "seeds; no claim" in text
    )


def test_six_seeds_decide_a_claim_by_the_sign_flip_test() -> None:
    six = [0.30, 0.31, 0.32, 0.33, 0.34, 0.35]
    ffl = method("ffl", "fused", fused=[v + 0.01 for v in six], ensemble=six, branch0=six, mean_branch=six)
    vanilla = method(
        "vanilla", "branch0", branch0=[v + 0.02 for v in six], mean_branch=[v + 0.02 for v in six]
    )
    found = msgspec.structs.replace(comparison(), methods=[with_seeds(ffl, 6), with_seeds(vanilla, 6)])
    text = account(found)
    assert (
        "above the ensemble: +1.00 [1.00, 1.00], above in 6 of 6 seeds; p = 0.031 (exact sign-flip): speaks "
        "for it." in text
    )
    assert (
        "above the mean branch: +0.00 [0.00, 0.00], above in 0 of 6 seeds; p = 1 (exact sign-flip): "
        "undecided." in text
    )
    assert (
        "alone: -2.00 [-2.00, -2.00], above in 0 of 6 seeds; p = 0.031 (exact sign-flip): speaks against it."
        in text
    )
    assert "Holm's correction for 4 claims makes 0.12 of the smallest" in text


def test_seeds_that_were_looked_at_before_are_told_from_the_others() -> None:
    fused, ensemble = [0.42, 0.43, 0.44, 0.41, 0.42, 0.43], [0.40, 0.41, 0.42, 0.40, 0.41, 0.42]
    found = msgspec.structs.replace(
        comparison(),
        methods=[with_seeds(method("ffl", "fused", fused=fused, ensemble=ensemble, mean_branch=ensemble), 6)],
    )
    (line,) = [line for line in account(found, before=[0, 1, 2]).splitlines() if "above the ensemble" in line]
    assert line.endswith(
        ": +1.50 [0.93, 2.07], above in 6 of 6 seeds; p = 0.031 (exact sign-flip): speaks for it. "
        "The later seeds alone: +1.00 [1.00, 1.00]."
    )


def test_the_committed_page_is_what_the_command_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the check that it needs neither the run nor the data."""
    root = Path(__file__).parents[2]
    shutil.copytree(root / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    (tmp_path / "examples").symlink_to(root / "examples")
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert (tmp_path / "docs/results.md").read_text() == (root / "docs/results.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", (tmp_path / "docs/results.md").read_text())
    assert len(pictures) == 6
    assert all((tmp_path / "docs" / picture).stat().st_size > 10_000 for picture in pictures)


def student(folder: Path, right: list[bool], teacher: str | None, seed: int = 3) -> Run:
    folder.mkdir()
    np.savez(folder / PREDICTIONS, labels=np.ones(len(right), int), branch0=np.array(right, int))
    options = {"seed": seed, "recipe": "r", "optimisation": {}, "data": {}, "model": {"teacher": teacher}}
    return cast(Run, SimpleNamespace(folder=folder, config=SimpleNamespace(options=options)))


def test_a_taught_student_is_compared_with_itself_alone(tmp_path: Path) -> None:
    alone = student(tmp_path / "alone", [True, True, False, False, False], None)
    taught = student(tmp_path / "taught", [True, False, True, True, True], "runs/t")
    found = compared(alone, taught)
    assert (found["seed"], found["reference_accuracy"], found["candidate_accuracy"]) == (3, 0.4, 0.8)
    assert (found["gained"], found["lost"]) == (3, 1)
    other = student(tmp_path / "other", [True] * 5, "runs/t", seed=4)
    for pair in ((alone, other), (taught, alone), (alone, alone)):
        with pytest.raises(UsageError, match="are no pair: they have to be of one seed"):
            compared(*pair)
    with pytest.raises(UsageError, match="runs in pairs: alone, taught"):
        collect(tmp_path, [tmp_path / "alone"], tmp_path)


def test_what_the_teacher_brings_is_told_over_all_seeds(tmp_path: Path) -> None:
    def pair(delta: float, low: float) -> dict[str, Any]:
        return {"delta": delta, "interval": {"low": low, "high": delta + 0.01}}

    pairs = [pair(0.03, 0.01), pair(0.01, -0.002), pair(-0.01, -0.02)]
    assert verdict(pairs) == (
        "The taught student is better in 2 of 3 seeds, by +1.00 points on average; in 1 of them the interval "
        "of the difference is above 0."
    )
    assert text(tmp_path) == ""  # no such runs were stored


def test_the_page_holds_the_comparison_and_its_ablations(tmp_path: Path) -> None:
    assert "nothing here says that FFL beats another method" in comparison_text(tmp_path)
    write_json(tmp_path / "compare-cifar100.json", msgspec.structs.replace(comparison(), reference="vanilla"))
    with pytest.raises(UsageError, match="does not compare with ffl"):
        comparison_text(tmp_path)
    ablations = comparison()
    write_json(tmp_path / "ablations-cifar100.json", ablations)
    without = [method for method in ablations.methods if method.method != "ffl-no-ekd"]
    write_json(tmp_path / "compare-cifar100.json", msgspec.structs.replace(ablations, methods=without))
    methods, parts = comparison_text(tmp_path).split("## What the parts of FFL bring")
    assert "    the command" in methods
    assert "| vanilla | resnet8 + resnet8 | branch0 | 36.00 ± 2.83 |" in methods
    assert "ffl-no-ekd" not in methods
    assert "the ensemble is above the mean branch: +4.00 [4.00, 4.00], above in 2 of 2 seeds" in methods
    assert "| ffl | 60.5 ± 0.7 | 2 (fused) | 1 | 3 |" in methods
    assert (tmp_path / "compare-cifar100.png").stat().st_size > 10_000
    assert "| ffl-no-ekd | +1.50 [-4.85, 7.85] | no claim below 6 seeds | 11 / 5 | 0.7, 0.3 |" in parts


def test_the_claims_are_read_from_more_seeds_of_fewer_methods(tmp_path: Path) -> None:
    six = [0.30, 0.31, 0.32, 0.33, 0.34, 0.35]
    ffl = with_seeds(method("ffl", "fused", fused=six, ensemble=six, branch0=six, mean_branch=six), 6)
    one = with_seeds(method("one", "gated", gated=[v + 0.01 for v in six], branch0=six, mean_branch=six), 6)
    write_json(tmp_path / "compare-cifar100.json", comparison())
    more = msgspec.structs.replace(comparison(), methods=[ffl, one], command="the other command")
    write_json(tmp_path / "claims-cifar100.json", more)
    text = comparison_text(tmp_path)
    assert (
        "With 6 seeds of the methods that decide them. 2 of these seeds are those of the tables above" in text
    )
    assert "\n\n    the other command\n\n" in text
    assert (
        "seed. Not run for this page: `ffl-no-fkd`, `ffl-sum`, `ffl-mean`, `independent`, `dml`, `cl-ilr`, "
        in text
    )
    assert (
        "- the fused classifier is above the strong classifier of one: -1.00 [-1.00, -1.00], above in 0 of 6 "
        "seeds; p = 0.031 (exact sign-flip): speaks against it. The later seeds alone: -1.00 [-1.00, -1.00]."
    ) in text
