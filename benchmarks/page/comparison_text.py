"""The part of docs/results.md that compares methods, from what train.compare stored in docs/.

compare-cifar100.json holds all methods, claims-cifar100.json more seeds of the few that decide the paper's
claims, ablations-cifar100.json FFL without its parts; results/reading.md is written by hand. The sentences of
the page are in methods.md, claims.md and ablations.md beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from ffl_deploy.errors import UsageError
from ffl_deploy.markdown import fill
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

METHODS_PAGE, CLAIMS_PAGE, ABLATIONS_PAGE = (
    Path(__file__).with_name(f"{name}.md") for name in ("methods", "claims", "ablations")
)
NOTHING_STORED = """\
## What this does not show

One run, one seed: nothing here says that FFL beats another method."""


def comparison_text(folder: Path) -> str:
    """-> the stored comparison of methods, what it says of the paper's claims, and what it does not show."""
    compared = read_comparison(folder / "compare-cifar100.json")
    claims = read_comparison(folder / "claims-cifar100.json")
    ablations = read_comparison(folder / "ablations-cifar100.json")
    if compared is None:
        return NOTHING_STORED
    picture = folder / "compare-cifar100.png"
    draw(compared, picture)
    reading = folder / "results" / "reading.md"
    seeds = min(len(method.seeds) for method in compared.methods)
    return fill(
        METHODS_PAGE,
        branches=" + ".join(reference_of(compared).branches),
        epochs=str(compared.epochs),
        train_images=f"{compared.images['train']:,}",
        test_images=f"{compared.images['test']:,}",
        seeds=counted(seeds, "seed"),
        file="compare-cifar100.json",
        command=compared.command,
        picture=picture.name,
        accuracy=accuracy_table(compared),
        reference=compared.reference,
        differences=difference_table([(method.method, method.against) for method in compared.methods]),
        alone=difference_table([(method.method, method.alone) for method in compared.methods]),
        cost=cost_table(compared),
        claims=claims_text(claims, compared) if claims else account(compared),
        reading=reading.read_text().rstrip() if reading.is_file() else "",
        ablations=ablations_text(ablations, folder / "ablations-cifar100.png") if ablations else "",
        limits=limits(compared, seeds),
        not_run=not_run(compared, ablations, claims),
    ).rstrip()


def claims_text(found: Comparison, seen: Comparison) -> str:
    """-> the account of fewer methods with more seeds than `seen` has, some of them its own."""
    before = reference_of(seen).seeds
    return fill(
        CLAIMS_PAGE,
        seeds=counted(min(len(method.seeds) for method in found.methods), "seed"),
        before=str(len(before)),
        command=found.command,
        account=account(found, before),
        reference=found.reference,
        differences=difference_table([(method.method, method.against) for method in found.methods]),
        alone=difference_table([(method.method, method.alone) for method in found.methods]),
    ).rstrip()


def ablations_text(found: Comparison, picture: Path) -> str:
    """-> what FFL is without one of its parts; the figure is drawn as `picture`."""
    draw(found, picture)
    return fill(
        ABLATIONS_PAGE,
        seeds=counted(min(len(method.seeds) for method in found.methods), "seed"),
        command=found.command,
        picture=picture.name,
        accuracy=accuracy_table(found),
        differences=difference_table([(method.method, method.against) for method in found.methods]),
    ).rstrip()


def not_run(*stored: Comparison | None) -> str:
    """-> a sentence on the methods of this package that no stored comparison holds."""
    run = {method.method for comparison in stored if comparison for method in comparison.methods}
    missing = [f"`{name}`" for name in METHODS if name not in run]
    return f"Not run for this page: {', '.join(missing)}." if missing else ""


def read_comparison(path: Path) -> Comparison | None:
    """-> a stored comparison with ffl, the reference; None where none is stored.
    Raises UsageError where ffl is not in it.
    """
    if not path.is_file():
        return None
    found = msgspec.json.decode(path.read_bytes(), type=Comparison)
    if "ffl" not in {found.reference} & {method.method for method in found.methods}:
        raise UsageError(f"{path} does not compare with ffl; run its command with ffl among --methods.")
    return found


def reference_of(found: Comparison) -> MethodResult:
    return next(method for method in found.methods if method.method == found.reference)


class Claim(NamedTuple):
    """`said`, which holds where classifier `one` of `method` is above classifier `other` of `rival`."""

    said: str
    one: str
    method: MethodResult
    other: str
    rival: MethodResult

    def differences(self) -> dict[int, float]:
        """-> seed -> by how much it is above, of the seeds that both were trained with."""
        rival = dict(zip(self.rival.seeds, self.rival.accuracy[self.other].values, strict=True))
        method = zip(self.method.seeds, self.method.accuracy[self.one].values, strict=True)
        return {seed: value - rival[seed] for seed, value in method if seed in rival}


def paper_claims(found: Comparison) -> list[Claim]:
    """-> the claims of the paper that this comparison can look at."""
    ffl = reference_of(found)
    claims = [
        Claim("the fused classifier is above the ensemble", "fused", ffl, "ensemble", ffl),
        Claim("the ensemble is above the mean branch", "ensemble", ffl, "mean branch", ffl),
    ]
    for vanilla in found.methods:
        if vanilla.method == "vanilla":
            fused = "the fused classifier is above one branch's network trained alone"
            mean = "the mean branch is above the same network trained alone"
            claims.append(Claim(fused, "fused", ffl, "branch0", vanilla))
            claims.append(Claim(mean, "mean branch", ffl, "branch0", vanilla))
    for rival in found.methods:
        if rival.method not in ("ffl", "vanilla"):
            said = f"the fused classifier is above the strong classifier of {rival.method}"
            claims.append(Claim(said, "fused", ffl, rival.strong, rival))
    return claims


def account(found: Comparison, before: Sequence[int] = ()) -> str:
    """-> the claims of the paper, each with the number that speaks for or against it.

    before: seeds that had been looked at when the others were chosen; each claim then shows the others alone
    as well.
    """
    lines, smallest = [], 1.0
    for claim in paper_claims(found):
        by_seed = claim.differences()
        if not by_seed:
            continue
        values = list(by_seed.values())
        p = sign_flip_p(values) if len(values) >= SEEDS_FOR_A_CLAIM else None
        against = Against(estimate(values), p, [])
        smallest = min(smallest, 1.0 if p is None else p)
        above = f"above in {sum(value > 0 for value in values)} of {counted(len(values), 'seed')}"
        later = [value for seed, value in by_seed.items() if seed not in before]
        alone = f" The later seeds alone: {points(estimate(later))}." if before and later else ""
        lines.append(f"- {claim.said}: {points(against.difference)}, {above}; {verdict(against)}.{alone}")
    corrected = min(1.0, smallest * len(lines))
    holm = (
        f" (Holm's correction for {len(lines)} claims makes {corrected:.2g} of the smallest)"
        if smallest < 1
        else ""
    )
    heading = f"Points with their 95 % t-interval over seeds; p values are not corrected{holm}:"
    return "\n".join([heading, "", *lines])


def verdict(against: Against) -> str:
    """-> what a claim's difference over seeds says, by the sign-flip test;
    nothing below SEEDS_FOR_A_CLAIM seeds."""
    if against.p_seeds is None:
        return seed_verdict(against)
    says = "speaks for it" if against.difference.mean > 0 else "speaks against it"
    return f"{seed_verdict(against)}: {says if against.p_seeds < 0.05 else 'undecided'}"
