"""docs/results.md says of the paper's claims what the stored comparison says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.comparison_text import account, comparison_text
from ffl_deploy.errors import UsageError
from ffl_deploy.run_directory import write_json
from train.comparison import Against, Comparison, MethodResult, SeedPair, estimate


def method(name: str, strong: str, **accuracy: list[float]) -> MethodResult:
    values = {key.replace("_", " "): estimate(value) for key, value in accuracy.items()}
    against = Against(estimate([0.01, 0.02]), None, [SeedPair(0, 5, 3, 0.7), SeedPair(1, 6, 2, 0.3)])
    parameters = {strong: 2, "branch0": 1, "training": 3}
    return MethodResult(name, ["resnet8"] * 2, strong, [0, 1], values, estimate([60.0, 61.0]), parameters, against, against)


def with_seeds(result: MethodResult, count: int) -> MethodResult:
    return msgspec.structs.replace(result, seeds=list(range(count)))


def comparison() -> Comparison:
    ffl = method("ffl", "fused", fused=[0.40, 0.41], ensemble=[0.39, 0.40], branch0=[0.35, 0.36], mean_branch=[0.35, 0.36])
    vanilla = method("vanilla", "branch0", branch0=[0.34, 0.38], mean_branch=[0.34, 0.38])
    no_ekd = method("ffl-no-ekd", "fused", fused=[0.39, 0.39], ensemble=[0.39, 0.39], branch0=[0.3, 0.3], mean_branch=[0.3, 0.3])
    images = {"train": 49_000, "validation": 1_000, "test": 10_000}
    return Comparison("the command", "cifar100", 100, images, (32, 32), 4, "ffl", {}, [ffl, vanilla, no_ekd])


def test_two_seeds_decide_no_claim() -> None:
    text = "\n".join(account(comparison()))
    above = "- the fused classifier is above the ensemble: +1.00 [1.00, 1.00], above in 2 of 2 seeds; no claim below 6 seeds."
    assert above in text
    assert "- a branch is above the same network alone: -0.50 [-19.56, 18.56], above in 1 of 2 seeds; no claim" in text


def test_six_seeds_decide_a_claim_by_the_sign_flip_test() -> None:
    six = [0.30, 0.31, 0.32, 0.33, 0.34, 0.35]
    ffl = method("ffl", "fused", fused=[v + 0.01 for v in six], ensemble=six, branch0=six, mean_branch=six)
    vanilla = method("vanilla", "branch0", branch0=[v + 0.02 for v in six], mean_branch=[v + 0.02 for v in six])
    found = msgspec.structs.replace(comparison(), methods=[with_seeds(ffl, 6), with_seeds(vanilla, 6)])
    text = "\n".join(account(found))
    assert "above the ensemble: +1.00 [1.00, 1.00], above in 6 of 6 seeds; p = 0.031 (exact sign-flip): holds." in text
    assert "above the mean branch: +0.00 [0.00, 0.00], above in 0 of 6 seeds; p = 1 (exact sign-flip): undecided." in text
    assert "alone: -2.00 [-2.00, -2.00], above in 0 of 6 seeds; p = 0.031 (exact sign-flip): does not hold here." in text


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
    assert "With 6 seeds:\n\n    the other command" in text
    assert (
        "- the fused classifier is above the strong classifier of one: -1.00 [-1.00, -1.00], above in 0 of 6 seeds; "
        "p = 0.031 (exact sign-flip): does not hold here."
    ) in text
