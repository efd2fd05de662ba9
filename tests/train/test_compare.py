"""Methods x seeds: the statistics against independent values, and the command from flags to tables."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ffl_deploy.errors import CheckError, Interrupted, UsageError
from train import compare as command
from train.comparison import plan
from train.comparison.results import SEEDS_FOR_A_CLAIM, against, estimate, sign_flip_p
from train.config import TrainConfig
from train.flags import Flags


def test_t_interval_of_five_seeds() -> None:
    value = estimate([0.91, 0.93, 0.92, 0.95, 0.94])
    assert value.mean == pytest.approx(0.93)
    assert value.std == pytest.approx(0.0158114, abs=1e-7)
    half = 2.776445 * 0.0158114 / 5**0.5  # t of 4 degrees of freedom at 97.5 %, from the tables
    assert (value.low, value.high) == (
        pytest.approx(0.93 - half, abs=1e-6),
        pytest.approx(0.93 + half, abs=1e-6),
    )


def test_one_seed_has_no_spread() -> None:
    value = estimate([0.5])
    assert (value.mean, value.std, value.low, value.high) == (0.5, None, None, None)


@pytest.mark.parametrize(
    "differences", [[0.1, 0.2, -0.05, 0.3, 0.1, 0.02], [0.01] * 6, [1.0, -1.0, 2.0, 0.0, 0.5, -0.2, 0.1]]
)
def test_sign_flip_test_counts_all_signs(differences: list[float]) -> None:
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = sum(total >= abs(sum(differences)) - 1e-12 for total in sums) / len(sums)
    assert sign_flip_p(differences) == pytest.approx(expected)


def test_fewer_seeds_than_six_cannot_be_significant() -> None:
    assert sign_flip_p([1.0] * (SEEDS_FOR_A_CLAIM - 1)) > 0.05 > sign_flip_p([1.0] * SEEDS_FOR_A_CLAIM)


@pytest.fixture(autouse=True)
def without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.session.draw_curves", lambda *arguments: None)


class FakeRun:
    """What `against` needs of a Finished run: its seed, and which images its strong classifier gets right."""

    def __init__(self, seed: int, right: list[int]) -> None:
        self.seed, self.right = seed, {"fused": np.array(right, bool)}
        self.run = type("Run", (), {"model": type("Model", (), {"strong": "fused"})()})()


def test_methods_are_paired_by_seed_and_image() -> None:
    references = [FakeRun(0, [1, 1, 1, 0, 0, 1, 1, 1]), FakeRun(1, [1, 0, 1, 0, 1, 1, 1, 1])]
    runs = [FakeRun(1, [1, 1, 1, 1, 0, 1, 1, 1]), FakeRun(0, [0, 0, 0, 0, 1, 0, 0, 0]), FakeRun(2, [1] * 8)]
    result = against(runs, references)  # type: ignore[arg-type]
    assert result is not None
    assert [(pair.seed, pair.gained, pair.lost) for pair in result.pairs] == [(1, 2, 1), (0, 1, 6)]
    assert result.pairs[0].p == 1.0
    assert result.pairs[1].p == pytest.approx(2 * (1 + 7) / 2**7)  # binomial(7, 1/2) up to 1, both tails
    assert result.difference.values == pytest.approx([1 / 8, -5 / 8])
    assert result.p_seeds is None


def test_six_common_seeds_are_tested() -> None:
    references = [FakeRun(seed, [0, 0, 1, 1]) for seed in range(6)]
    runs = [FakeRun(seed, [1, 0, 1, 1]) for seed in range(6)]
    result = against(runs, references)  # type: ignore[arg-type]
    assert result is not None
    assert result.p_seeds == pytest.approx(2 / 64)
    assert against(runs, [FakeRun(9, [0, 0, 0, 0])]) is None  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"ffl": 2, "vanilla": 1, "okddip": 3, "dualnet": 2}),
        (["--branches", "resnet32,resnet32,resnet32"], {"ffl": 3, "vanilla": 1, "okddip": 3, "dualnet": 2}),
        (["--branches", "resnet32,resnet32"], {"ffl": 2, "vanilla": 1, "okddip": 3, "dualnet": 2}),
    ],
)
def test_every_method_gets_as_many_branches_as_it_trains(flags: list[str], expected: dict[str, int]) -> None:
    typed = Flags("compare", plan.CompareOptions(), others=TrainConfig()).typed(flags)
    assert {method: len(plan.method_config(method, typed).model.branches) for method in expected} == expected


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--methods", "ffl,dmll"], "there is no method 'dmll'. Did you mean 'dml'?"),
        (["--methods", "ffl,ffl"], "each once"),
        (["--seeds", "many"], "--seeds: 'many' is not a whole number"),
        (["--epoch", "3"], "unrecognized arguments: --epoch. Did you mean --epochs?"),
        (["--seeds", "0"], "--seeds must be from 1 to 20"),
        (["--seed", "3"], "--seed belongs to python -m train.run"),
        (["--method=ffl"], "--method belongs to"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (
            ["--methods", "ffl,one", "--branches", "resnet20,resnet32"],
            "ONE needs branches of one architecture",
        ),
    ],
)
def test_flags_that_no_comparison_can_use(flags: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        command.main([*flags, "--out", str(tmp_path / "out")])
    assert sentence in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def arguments(image_folder: Callable[..., Path], tmp_path: Path) -> list[str]:
    folder = image_folder(classes=("a", "b"), train=10, test=6, size=(8, 8))
    return [
        "--data", str(folder), "--branches", "resnet20,resnet20", "--epochs", "1", "--batch-size", "8",
        "--methods", "vanilla,ffl", "--seeds", "2", "--device", "cpu", "--precision", "fp32", "--out",
        str(tmp_path / "cmp"),
    ]  # fmt: skip


def test_from_flags_to_tables_and_again_without_training(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train.session

    trained: list[str] = []
    original = train.session.run_training

    def failing_once(config: TrainConfig, stop: object = None) -> int:
        assert config.output.out is not None
        trained.append(config.output.out.name)
        if len(trained) == 3:
            raise Interrupted("stopped in epoch 1")  # as after a signal, which sets the request too
        return original(config, stop)  # type: ignore[arg-type]

    def stopping(config: TrainConfig, stop: object = None) -> int:
        try:
            return failing_once(config, stop)
        except Interrupted:
            stop.requested = True  # type: ignore[union-attr]
            raise

    monkeypatch.setattr(train.session, "run_training", stopping)
    with pytest.raises(Interrupted, match=r"vanilla-seed1; the same command goes on"):
        command.main(arguments)
    assert command.main(arguments) == 0
    # Seed by seed; what was finished is not repeated.
    assert trained == ["vanilla-seed0", "ffl-seed0", "vanilla-seed1", "vanilla-seed1", "ffl-seed1"]
    assert command.main(arguments) == 0
    assert len(trained) == 5

    out = tmp_path / "cmp"
    report = json.loads((out / "cmp.json").read_text())
    assert report["reference"] == "ffl"
    assert [method["method"] for method in report["methods"]] == ["vanilla", "ffl"]
    vanilla, ffl = report["methods"]
    for method in (vanilla, ffl):
        for seed, value in enumerate(method["accuracy"][method["strong"]]["values"]):
            with np.load(
                out / f"{method['method']}-seed{seed}" / "test_predictions.npz", allow_pickle=False
            ) as arrays:
                assert value == pytest.approx(np.mean(arrays[method["strong"]] == arrays["labels"]), abs=1e-6)
                assert arrays["labels"].tolist() == [0] * 6 + [1] * 6
    assert ffl["against"] is None
    pairs = vanilla["against"]["pairs"]
    assert [(p["gained"] - p["lost"]) / 12 for p in pairs] == pytest.approx(
        vanilla["against"]["difference"]["values"]
    )
    assert vanilla["alone"] is None
    branch0 = [method["accuracy"]["branch0"]["values"] for method in (vanilla, ffl)]
    assert ffl["alone"]["difference"]["values"] == pytest.approx(
        np.subtract(*reversed(branch0)).tolist(), abs=1e-6
    )
    assert ffl["parameters"]["branch0"] == vanilla["parameters"]["branch0"] < ffl["parameters"]["fused"]
    assert (out / "cmp.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "cmp.md").read_text()
    assert "no claim below 6 seeds" in text
    assert "What this does not show" in text
    assert "## One network alone, against vanilla" in text
    assert text in capsys.readouterr().out


def test_other_flags_than_the_finished_runs_had_are_refused(arguments: list[str]) -> None:
    few = [*arguments, "--methods", "vanilla", "--seeds", "1"]
    assert command.main(few) == 0
    with pytest.raises(
        UsageError, match=r"vanilla-seed0 was trained with other flags \(--epochs is 2 now and was 1\)"
    ):
        command.main([*few, "--epochs", "2"])


@pytest.mark.parametrize(
    "error",
    [CheckError("the loss is not finite at step 3."), UsageError("ffl needs branches of equal channels.")],
)
def test_a_run_that_fails_is_named_and_the_others_go_on(
    error: Exception,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import train.session

    original = train.session.run_training

    def run(config: TrainConfig, stop: object = None) -> int:
        if config.model.method == "ffl":
            raise error
        return original(config, stop)  # type: ignore[arg-type]

    monkeypatch.setattr(train.session, "run_training", run)
    assert command.main([*arguments, "--seeds", "1"]) == 1
    captured = capsys.readouterr()
    assert f"ffl-seed0: {error}" in captured.err
    assert "| vanilla |" in captured.out
