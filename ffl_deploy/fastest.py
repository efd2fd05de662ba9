"""`--variant auto`: the fastest variant that gives PyTorch's answers on this machine,
found by running all of them.

Every ONNX file on every installed runtime that reads it, and every engine, is opened, held to its gate, and
timed by turns, so that a change of the machine's load meets all of them. What was found is remembered
(verdicts.py).
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from ffl_deploy import selfcheck, verdicts
from ffl_deploy.errors import CheckError, OtherMachine, UsageError
from ffl_deploy.files import shown
from ffl_deploy.host import available_cores
from ffl_deploy.parity import PARITY_GATES, PRECISIONS
from ffl_deploy.processor import kernels, nvidia
from ffl_deploy.runtime import RUNTIMES, Session
from ffl_deploy.runtime.tensorrt_cache import is_kept

if TYPE_CHECKING:
    from ffl_deploy.bundle_files import BundleFiles
    from ffl_deploy.manifest import Variant

EVERYWHERE = tuple(name for name, runtime in RUNTIMES.items() if not runtime.compiles)
"""Runtimes that are tried for every ONNX file. The others compile for minutes:
each is tried for the variants made for it."""
PACKAGES = tuple(dict.fromkeys(name for runtime in RUNTIMES.values() for name in runtime.packages))
BATCH = 32  # images in one run
RUN_SECONDS = 0.5  # where a run of so many takes longer, all candidates get fewer
WINDOW_SECONDS = 0.3  # of runs for each candidate
MIN_ROUNDS = 3
WORTH = 1.05  # a coarser precision must be this much faster


class Choice(msgspec.Struct, frozen=True):
    """What --variant auto came to: `why` for people; `images_per_second` of what holds and `refused` of what
    does not or cannot run, by "VARIANT on RUNTIME"."""

    variant: str
    runtime: str
    why: str
    images_per_second: dict[str, float]
    refused: dict[str, str]


class Candidate(NamedTuple):
    variant: Variant
    session: Session

    @property
    def name(self) -> str:
        return f"{self.variant.name} on {self.session.runtime}"


class Timings(NamedTuple):
    """`seconds[i][r]`: what candidate i took for `batch` images in round r; a round is one run of each."""

    batch: int
    seconds: list[list[float]]


def fastest(
    bundle: BundleFiles, runtime: str | None = None, threads: int | None = None, remembered: bool = True
) -> Choice:
    """-> the fastest variant of `bundle` that holds its gate here, on `runtime` (any that is installed)
    with `threads` (all).

    Args: remembered: take what an earlier call found on this machine with these runtimes.
    Raises CheckError where none holds or a file was changed, UsageError where none can be run.
    """
    question = _question(bundle, runtime, threads)
    known = _valid(bundle, verdicts.recall(question)) if remembered else None
    if known is not None:
        return known
    holding: list[Candidate] = []
    try:
        refused = _open_all(bundle, runtime, threads, holding)
        timings = timed([candidate.session for candidate in holding], bundle.golden().images)
        choice = chosen(holding, timings, refused)
        if all(kernels(candidate.session.runtime) is not None for candidate in holding):
            verdicts.remember(question, msgspec.to_builtins(choice))
    finally:
        for candidate in holding:
            candidate.session.close()
    return choice


def _open_all(
    bundle: BundleFiles, runtime: str | None, threads: int | None, holding: list[Candidate]
) -> dict[str, str]:
    """Fill `holding` with the open candidates, finest precision first; -> name -> why not, of the others.

    Raises CheckError and UsageError where there is none.
    """
    refused: dict[str, str] = {}
    wrong = False  # something ran, or should have, and was not right: more than "not installed"
    for variant in bundle.manifest.variants:
        bundle.checked_file(variant.file)  # a changed file is no reason to take another one in silence
    for variant, name in _combinations(bundle, runtime):
        label = f"{variant.name} on {name}"
        try:
            session = bundle.open(variant.name, name, threads)
        except (UsageError, OtherMachine) as error:
            if name == (runtime or variant.runtime):
                refused[label] = f"not run: {str(error).rstrip('.')}"
            continue
        except CheckError as error:
            refused[label], wrong = str(error).rstrip("."), True
            continue
        broken = selfcheck.broken_gate(bundle, variant, session, threads)
        if broken:
            session.close()
            refused[label], wrong = broken, True
        else:
            holding.append(Candidate(variant, session))
    if holding:
        return refused
    reasons = "; ".join(f"{label}: {reason}" for label, reason in refused.items())
    if wrong:
        raise CheckError(
            f"no variant of {shown(bundle.folder)} gives PyTorch's logits on this machine ({reasons}); "
            "export it again with ffl-export, or use another machine."
        )
    raise UsageError(f"no variant of {shown(bundle.folder)} can be run on this machine ({reasons}).")


def _combinations(bundle: BundleFiles, runtime: str | None) -> list[tuple[Variant, str]]:
    """-> what to try: each file on its variant's own runtime and on those that take any, each pair once."""
    variants = sorted(bundle.manifest.variants, key=lambda variant: _coarseness(variant))
    own = [(variant, runtime or variant.runtime) for variant in variants]
    anywhere = [
        (variant, name) for variant in variants if variant.file.endswith(".onnx") for name in EVERYWHERE
    ]
    pairs = {(variant.file, variant.precision.computed, name): (variant, name) for variant, name in own[::-1]}
    if runtime is None:
        anywhere += [(variant, "tensorrt") for variant in _with_engines(bundle)]
        for variant, name in anywhere:
            pairs.setdefault((variant.file, variant.precision.computed, name), (variant, name))
    return sorted(
        pairs.values(), key=lambda pair: (_coarseness(pair[0]), own.index(pair) if pair in own else len(own))
    )


def _with_engines(bundle: BundleFiles) -> list[Variant]:
    """-> the ONNX variants of which an engine was built for this GPU before: it takes no minutes to open."""
    return [
        variant
        for variant in bundle.manifest.variants
        if variant.file.endswith(".onnx") and is_kept(variant.sha256)
    ]


def _coarseness(variant: Variant) -> int:
    return PRECISIONS.index(variant.precision.stored)


def timed(sessions: Sequence[Session], images: np.ndarray) -> Timings:
    """Run the sessions by turns on `images`, uint8 [n, h, w, 3], repeated or cut to a batch;
    the first runs are not timed."""
    batch = BATCH
    slowest = max(
        _seconds(session, np.resize(images, (1, *images.shape[1:])), runs=2) for session in sessions
    )
    if slowest * batch > RUN_SECONDS:
        batch = max(1, int(RUN_SECONDS / slowest))
    pixels = np.resize(images, (batch, *images.shape[1:]))
    for session in sessions:
        session.run(pixels)
    seconds: list[list[float]] = [[] for _ in sessions]
    deadline = time.perf_counter() + WINDOW_SECONDS * len(sessions)
    while len(seconds[0]) < MIN_ROUNDS or time.perf_counter() < deadline:
        for session, taken in zip(sessions, seconds, strict=True):
            taken.append(_seconds(session, pixels))
    return Timings(batch, seconds)


def _seconds(session: Session, pixels: np.ndarray, runs: int = 1) -> float:
    """-> of the last of `runs` runs."""
    started = 0.0
    for _ in range(runs):
        started = time.perf_counter()
        session.run(pixels)
    return time.perf_counter() - started


def chosen(holding: Sequence[Candidate], timings: Timings, refused: dict[str, str]) -> Choice:
    """-> the fastest of `holding`, which comes finest precision first; a coarser one has to be worth it."""

    def gain(candidate: int, over: int) -> float:
        pairs = zip(timings.seconds[over], timings.seconds[candidate], strict=True)
        return statistics.median(before / after for before, after in pairs)

    best = 0
    for index in range(1, len(holding)):
        coarser = _coarseness(holding[index].variant) > _coarseness(holding[best].variant)
        if gain(index, over=best) > (WORTH if coarser else 1.0):
            best = index
    rates = {
        candidate.name: round(timings.batch / statistics.median(taken), 1)
        for candidate, taken in zip(holding, timings.seconds, strict=True)
    }
    taken, *others = sorted(rates.items(), key=lambda item: item[0] != holding[best].name)
    why = (
        f"{taken[0]} is the fastest that holds its gate here: {_shown(taken[1])} images/s at batch "
        f"{timings.batch}"
    )
    if others:
        why += f", {', '.join(f'{name} {_shown(rate)}' for name, rate in others)}"
        if max(rates.values()) > taken[1]:
            why += f" (a coarser precision has to be {WORTH - 1:.0%} faster)"
    if refused:
        why += f"; does not hold or run here: {', '.join(refused)}"
    return Choice(holding[best].variant.name, holding[best].session.runtime, why, rates, refused)


def _shown(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def _valid(bundle: BundleFiles, answer: Any) -> Choice | None:
    """-> a remembered choice, if it is one of this bundle's."""
    try:
        choice = msgspec.convert(answer, Choice)
    except msgspec.ValidationError:
        return None
    known = {variant.name for variant in bundle.manifest.variants}
    return choice if choice.variant in known and choice.runtime in RUNTIMES else None


def _question(bundle: BundleFiles, runtime: str | None, threads: int | None) -> dict[str, Any]:
    """-> everything that the choice depends on, as long as nothing
    that can be chosen runs on a GPU of unknown kind."""
    return {
        "asks": "fastest variant",
        "check": selfcheck.VERSION,
        "bundle": bundle.sha256,
        "only": runtime,
        "runtimes": {name: found for name in PACKAGES if (found := _version(name))},
        "threads": threads or available_cores(),
        "gates": msgspec.to_builtins(PARITY_GATES),
        "processor": kernels("onnxruntime"),
        "gpu": nvidia(),
        "engines": [variant.name for variant in _with_engines(bundle)],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
