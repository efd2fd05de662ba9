"""What finished runs of several methods say about each other: over seeds, and image by image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from scipy import stats

from ffl_deploy.arrays import read_arrays
from ffl_deploy.networks.checkpoint import build_network
from ffl_deploy.networks.targets import build_target, target_names
from ffl_deploy.run_directory import PREDICTIONS, SUMMARY, Run, load_run
from ffl_deploy.statistics import paired_difference

if TYPE_CHECKING:
    from train.comparison.plan import PlannedRun

SEEDS_FOR_A_CLAIM = 6
"""With n seeds a sign-flip test can give no p below 2 / 2^n: 0.062 with 5, 0.031 with 6."""
CONFIDENCE = 0.95


class Estimate(msgspec.Struct, frozen=True):
    """Values of several seeds. std: of the sample (n - 1); low and high: 95 % t-interval of the mean;
    None for one seed."""

    values: list[float]
    mean: float
    std: float | None
    low: float | None
    high: float | None


class SeedPair(msgspec.Struct, frozen=True):
    """A method's strong classifier against the reference's, same seed, same test images.

    gained: images that only the method gets right; lost: only the reference; p: exact McNemar, two-sided.
    """

    seed: int
    gained: int
    lost: int
    p: float


class Against(msgspec.Struct, frozen=True):
    """A method against the reference. difference: of accuracies, seed by seed, as shares of 1.

    p_seeds: two-sided exact sign-flip test of the differences; None below SEEDS_FOR_A_CLAIM seeds.
    """

    difference: Estimate
    p_seeds: float | None
    pairs: list[SeedPair]


class MethodResult(msgspec.Struct, frozen=True):
    """One method. Accuracies are shares of 1; seconds: training time of a run; parameters:
    by deployable target."""

    method: str
    branches: list[str]
    strong: str
    seeds: list[int]
    accuracy: dict[str, Estimate]  # by classifier, and "mean branch"
    seconds: Estimate
    parameters: dict[str, int]
    against: Against | None  # None for the reference itself
    alone: Against | None = None  # branch0 against vanilla's, which is the same network trained by itself


class Comparison(msgspec.Struct, frozen=True):
    """All methods on one data set; what report.py writes."""

    command: str
    data: str
    classes: int
    images: dict[str, int]  # split -> number
    size: tuple[int, int]
    epochs: int
    reference: str
    toolchain: dict[str, str]
    methods: list[MethodResult]


class Finished(msgspec.Struct, frozen=True):
    """A finished run. right: classifier -> bool [test images]."""

    seed: int
    run: Run
    accuracy: dict[str, float]
    seconds: float
    right: dict[str, np.ndarray]


def compare(planned: Sequence[PlannedRun], reference: str, command: str) -> Comparison:
    """Put the finished runs `planned` together. reference: the method that the others are compared with."""
    by_method: dict[str, list[Finished]] = {}
    for item in planned:
        by_method.setdefault(item.method, []).append(read_finished(item))
    first = next(iter(by_method.values()))[0]
    config = first.run.config
    # `auto` is measured by each run; where other work decided it differently, the report says so.
    precisions = {run.run.config.toolchain["precision"] for runs in by_method.values() for run in runs}
    return Comparison(
        command=command,
        data=config.data_name,
        classes=len(config.classes),
        images={part: sum(counts) for part, counts in config.split["images_per_class"].items()},
        size=(config.preprocessing.width, config.preprocessing.height),
        epochs=config.options["optimisation"]["epochs"],
        reference=reference,
        toolchain=config.toolchain | {"precision": " and ".join(sorted(precisions))},
        methods=[
            result_of(name, runs, by_method.get(reference, []), by_method.get("vanilla", []))
            for name, runs in by_method.items()
        ],
    )


def read_finished(planned: PlannedRun) -> Finished:
    summary = msgspec.json.decode((planned.folder / SUMMARY).read_bytes())
    arrays = read_arrays(planned.folder / PREDICTIONS, ("labels",))
    right = {name: arrays[name] == arrays["labels"] for name in arrays if name != "labels"}
    return Finished(planned.seed, load_run(planned.folder), summary["accuracy"], summary["seconds"], right)


def result_of(
    name: str, runs: Sequence[Finished], references: Sequence[Finished], vanilla: Sequence[Finished]
) -> MethodResult:
    """-> one method's runs together, and against the runs of the reference, and vanilla's,
    with the same seeds."""
    model = runs[0].run.config.model
    accuracy = {
        classifier: estimate([run.accuracy[classifier] for run in runs]) for classifier in runs[0].accuracy
    }
    accuracy["mean branch"] = estimate(
        [
            float(np.mean([value for key, value in run.accuracy.items() if key.startswith("branch")]))
            for run in runs
        ]
    )
    return MethodResult(
        method=name,
        branches=list(model.network["branches"]),
        strong=model.strong,
        seeds=[run.seed for run in runs],
        accuracy=accuracy,
        seconds=estimate([run.seconds for run in runs]),
        parameters=parameters_by_target(runs[0].run),
        against=against(runs, references) if references and name != references[0].run.model.method else None,
        alone=against(runs, vanilla, "branch0") if vanilla and name != "vanilla" else None,
    )


def against(
    runs: Sequence[Finished], references: Sequence[Finished], classifier: str | None = None
) -> Against | None:
    """-> the strong classifiers, or `classifier` of both, compared;
    None where the two methods have no seed in common."""
    partner = {run.seed: run for run in references}
    differences, pairs = [], []
    for run in runs:
        if run.seed in partner:
            own, other = (one.right[classifier or one.run.model.strong] for one in (run, partner[run.seed]))
            paired = paired_difference(reference_right=other, candidate_right=own)
            differences.append(paired.delta)
            pairs.append(SeedPair(run.seed, paired.gained, paired.lost, paired.p_different))
    if not pairs:
        return None
    return Against(
        estimate(differences), sign_flip_p(differences) if len(pairs) >= SEEDS_FOR_A_CLAIM else None, pairs
    )


def estimate(values: Sequence[float]) -> Estimate:
    """-> mean, standard deviation and t-interval of `values`."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(list(values), mean, None, None, None)
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * std / count**0.5
    return Estimate(list(values), mean, std, mean - half, mean + half)


def sign_flip_p(differences: Sequence[float]) -> float:
    """-> exact two-sided p of Fisher's sign-flip test:
    how often random signs give a mean at least as far from 0."""
    values = np.asarray(differences)
    signs = 1 - 2 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1).astype(np.int8)
    return float(np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-12))


def parameters_by_target(run: Run) -> dict[str, int]:
    """-> deployable target -> number of parameters that it holds; "training" -> of all that is trained."""
    network = build_network(run)
    counts = {
        name: sum(parameter.numel() for parameter in build_target(network, name).parameters())
        for name in target_names(network)
    }
    return counts | {"training": sum(parameter.numel() for parameter in network.parameters())}
