"""The part of docs/results.md that compares methods, from what train.compare stored in docs/.

compare-cifar100.json holds all methods, claims-cifar100.json more seeds of the few that decide the paper's
claims, ablations-cifar100.json FFL without its parts; results/reading.md is written by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ffl_deploy.errors import UsageError
from train.comparison.report import (
    accuracy_table,
    cost_table,
    counted,
    difference_table,
    draw,
    limits,
    points,
    seed_verdict,
)
from train.comparison.results import (
    SEEDS_FOR_A_CLAIM,
    Against,
    Comparison,
    MethodResult,
    estimate,
    sign_flip_p,
)
from train.methods import METHODS


def comparison_text(folder: Path) -> str:
    """-> the stored comparison of methods, what it says of the paper's claims, and what it does not show."""
    reading = folder / "results" / "reading.md"
    path, ablations, claims = (
        folder / f"{name}-cifar100.json" for name in ("compare", "ablations", "claims")
    )
    if not path.is_file():
        return (
            "## What this does not show\n\nOne run, one seed: nothing here says that FFL beats another "
            "method."
        )
    found = read_comparison(path)
    parts, more = (read_comparison(other) if other.is_file() else None for other in (ablations, claims))
    draw(found, path.with_suffix(".png"))
    seeds = min(len(method.seeds) for method in found.methods)
    lines = [
        "## Against other methods",
        "",
        f"With equally many epochs, and few: {' + '.join(reference_of(found).branches)}, {found.epochs} "
        f"epochs, {found.images['train']:,} training images, {counted(seeds, 'seed')}; everything else as in "
        "the recipe above. What the methods cost is not equal: see the table at the end of this section. "
        f"Accuracy is that of the epoch with the best validation accuracy, on the {found.images['test']:,} "
        f"test images. All numbers: [{path.name}]({path.name}).",
        "",
        f"    {found.command}",
        "",
        "`data/cifar100` is a folder of CIFAR-100's images; with `--data cifar100` they are downloaded. The "
        "strong classifier is what a method is for: OKDDip's is its leader, a single network.",
        "",
        f"![accuracy by method]({path.stem}.png)",
        "",
        *accuracy_table(found),
        "",
        f"Strong classifier against that of {found.reference}, seed by seed on the same test images (points "
        "with their 95 % t-interval; images right here only / there only; exact McNemar, uncorrected):",
        "",
        *difference_table([(method.method, method.against) for method in found.methods]),
        "",
        "One network deployed alone (`branch0`) against the same network trained alone:",
        "",
        *difference_table([(method.method, method.alone) for method in found.methods]),
        "",
        "Cost (seconds of training one run on one thread, beside other work; parameters). Independent "
        "networks, DML and DualNet share no layers, the branches of the other methods share their low-level "
        "ones. DualNet's extractors take turns, so that each gets half of the steps, which are few here:",
        "",
        *cost_table(found),
        "",
        "## What the paper says, and what these runs say",
        "",
        *(claims_lines(more, found) if more else account(found)),
        "",
        *([reading.read_text()] if reading.is_file() else ()),
        *(ablation_lines(parts, ablations.with_suffix(".png")) if parts else ()),
        "## What this does not show",
        "",
        limits(found, seeds),
        "",
        f"The model above is one run with one seed. {not_run(found, parts, more)}".strip(),
    ]
    return "\n".join(lines)


def claims_lines(found: Comparison, seen: Comparison) -> list[str]:
    """-> the account of fewer methods with more seeds than `seen` has, some of them its own."""
    seeds = min(len(method.seeds) for method in found.methods)
    before = reference_of(seen).seeds
    return [
        f"With {counted(seeds, 'seed')} of the methods that decide them. {len(before)} of these seeds are "
        "those of the tables above; the others were trained, for these methods, after those tables had been "
        "seen, so each line also says what they say alone:",
        "",
        f"    {found.command}",
        "",
        *account(found, before),
        "",
        f"The two tables above, over these seeds. Strong classifier against that of {found.reference}:",
        "",
        *difference_table([(method.method, method.against) for method in found.methods]),
        "",
        "`branch0` against the same network trained alone:",
        "",
        *difference_table([(method.method, method.alone) for method in found.methods]),
    ]


def not_run(*stored: Comparison | None) -> str:
    """-> a sentence on the methods of this package that no stored comparison holds."""
    run = {method.method for comparison in stored if comparison for method in comparison.methods}
    missing = [f"`{name}`" for name in METHODS if name not in run]
    return f"Not run for this page: {', '.join(missing)}." if missing else ""


def ablation_lines(found: Comparison, picture: Path) -> list[str]:
    """-> what FFL is without one of its parts; the figure is drawn as `picture`."""
    draw(found, picture)
    seeds = min(len(method.seeds) for method in found.methods)
    return [
        "## What the parts of FFL bring",
        "",
        "Without the ensemble's teaching (`ffl-no-ekd`), without the fused classifier's (`ffl-no-fkd`), with "
        f"features summed instead of fused (`ffl-sum`); {counted(seeds, 'seed')}, read like the tables "
        "above:",
        "",
        f"    {found.command}",
        "",
        f"![accuracy without parts of FFL]({picture.name})",
        "",
        *accuracy_table(found),
        "",
        *difference_table([(method.method, method.against) for method in found.methods]),
        "",
    ]


def read_comparison(path: Path) -> Comparison:
    """-> a stored comparison with ffl, the reference. Raises UsageError where ffl is not in it."""
    found = msgspec.json.decode(path.read_bytes(), type=Comparison)
    if "ffl" not in {found.reference} & {method.method for method in found.methods}:
        raise UsageError(f"{path} does not compare with ffl; run its command with ffl among --methods.")
    return found


def reference_of(found: Comparison) -> MethodResult:
    return next(method for method in found.methods if method.method == found.reference)


def account(found: Comparison, before: Sequence[int] = ()) -> list[str]:
    """-> the claims of the paper that this comparison can look at,
    each with the number that speaks for or against it.

    before: seeds that had been looked at when the others were chosen;
    each claim then shows the others alone as well.
    """
    ffl = reference_of(found)
    vanilla = next((method for method in found.methods if method.method == "vanilla"), None)
    claims = [("the fused classifier is above the ensemble", "fused", ffl, "ensemble", ffl)]
    claims.append(("the ensemble is above the mean branch", "ensemble", ffl, "mean branch", ffl))
    if vanilla is not None:
        claims.append(
            (
                "the fused classifier is above one branch's network trained alone",
                "fused",
                ffl,
                "branch0",
                vanilla,
            )
        )
        claims.append(
            (
                "the mean branch is above the same network trained alone",
                "mean branch",
                ffl,
                "branch0",
                vanilla,
            )
        )
    others = [method for method in found.methods if method.method not in ("ffl", "vanilla")]
    claims += [
        (
            f"the fused classifier is above the strong classifier of {method.method}",
            "fused",
            ffl,
            method.strong,
            method,
        )
        for method in others
    ]
    lines, smallest = [], 1.0
    for claim, own, one, other, two in claims:
        partner = dict(zip(two.seeds, two.accuracy[other].values, strict=True))
        by_seed = {
            seed: value - partner[seed]
            for seed, value in zip(one.seeds, one.accuracy[own].values, strict=True)
            if seed in partner
        }
        values = list(by_seed.values())
        if not values:
            continue
        against = Against(
            estimate(values), sign_flip_p(values) if len(values) >= SEEDS_FOR_A_CLAIM else None, []
        )
        smallest = min(smallest, 1.0 if against.p_seeds is None else against.p_seeds)
        above = f"above in {sum(value > 0 for value in values)} of {counted(len(values), 'seed')}"
        later = [value for seed, value in by_seed.items() if seed not in before]
        alone = f" The later seeds alone: {points(estimate(later))}." if before and later else ""
        lines.append(f"- {claim}: {points(against.difference)}, {above}; {verdict(against)}.{alone}")
    corrected = min(1.0, smallest * len(lines))
    correction = (
        f" (Holm's correction for {len(lines)} claims makes {corrected:.2g} of the smallest)"
        if smallest < 1
        else ""
    )
    return [
        f"Points with their 95 % t-interval over seeds; p values are not corrected{correction}:",
        "",
        *lines,
    ]


def verdict(against: Against) -> str:
    """-> what a claim's difference over seeds says, by the sign-flip test;
    nothing below SEEDS_FOR_A_CLAIM seeds."""
    if against.p_seeds is None:
        return seed_verdict(against)
    says = "speaks for it" if against.difference.mean > 0 else "speaks against it"
    return f"{seed_verdict(against)}: {says if against.p_seeds < 0.05 else 'undecided'}"
