"""How fast the artefacts of an export are beside each other: short windows in turns, until the intervals are
small.

One window of one artefact measures the machine's neighbours as much as the file: two identical graphs have
differed by a third. Turns let a change of load meet all of them, and the spread of the windows says what they
are worth.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import numpy as np

from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import FflError
from ffl_deploy.manifest import Variant
from ffl_deploy.report import Timing, is_wide
from ffl_deploy.runtime import Session
from ffl_deploy.runtime.latency import machine_name

WINDOW_SECONDS, WINDOW_CALLS = 0.03, 5  # a window ends when it has both
MIN_ROUNDS, MAX_ROUNDS = 8, 200
SECONDS = 20.0  # for all artefacts together; MIN_ROUNDS are measured in any case


def time_bundles(bundles: Iterable[Bundle]) -> list[Timing]:
    """-> the timings of every variant that this machine exported and can open, one image at a time."""
    with ExitStack() as opened:
        runs: dict[str, Callable[[], Any]] = {}
        shares: dict[str, list[float]] = {}
        hashes = {}
        for bundle in bundles:
            for variant in bundle.manifest.variants:
                if variant.latency is None:
                    continue
                try:
                    session = opened.enter_context(closing(bundle.session(variant.name, check=False)))
                except FflError:
                    continue  # an engine of another GPU, a runtime that is gone: its number stays
                if variant.latency.machine != (session.gpu or machine_name()):
                    continue  # beside the accuracies of that machine stand its latencies
                name = f"{bundle.manifest.target}/{variant.name}"
                batch, kinds = bundle.manifest.input.batch or 1, kinds_of(bundle, variant, session)
                for number, kind in enumerate(kinds):
                    runs[f"{name} {number}"] = _run(session.run, np.repeat(kind.image, batch, axis=0))
                if kinds:
                    shares[name], hashes[name] = [kind.share for kind in kinds], variant.sha256
        if not runs:
            return []
        windows = in_turns(runs)
    found = {name: [windows[f"{name} {number}"] for number in range(len(of))] for name, of in shares.items()}
    return [Timing(name, hashes[name], *together(of, shares[name])) for name, of in found.items()]


class Kind(NamedTuple):
    """Images that take equally long. share: of the test images; image: one of them, uint8 [1, h, w, 3]."""

    share: float
    image: np.ndarray


def kinds_of(bundle: Bundle, variant: Variant, session: Session) -> list[Kind]:
    """-> one kind; of a cascade those that its first exit answers and those that are deferred, in the shares
    of the test images; none where the golden images show one of the two only."""
    images, record = bundle.golden().images, variant.details.cascade
    if record is None:
        return [Kind(1.0, images[:1])]
    exits = session.run(images).exit
    assert exits is not None
    shares = (1 - record.deferred, record.deferred)
    kinds = [Kind(share, images[exits == number][:1]) for number, share in enumerate(shares) if share]
    return kinds if all(len(kind.image) for kind in kinds) else []


def together(
    kinds: Sequence[Sequence[Sequence[float]]], shares: Sequence[float]
) -> tuple[list[float], float]:
    """kinds: the windows of each, in ms -> (what each round takes for one image of all kinds, on average;
    the 95th percentile of all calls)."""
    rounds = [
        sum(share * one for share, one in zip(shares, of_round, strict=True))
        for of_round in zip(*map(medians, kinds), strict=True)
    ]
    calls = [np.concatenate(windows) for windows in kinds]
    weights = [np.full(len(one), share / len(one)) for one, share in zip(calls, shares, strict=True)]
    values, order = np.concatenate(calls), np.argsort(np.concatenate(calls))
    reached = np.cumsum(np.concatenate(weights)[order])
    return rounds, float(values[order][min(int((reached < 0.95).sum()), len(values) - 1)])


def _run(run: Callable[[np.ndarray], Any], images: np.ndarray) -> Callable[[], Any]:
    return lambda: run(images)


def in_turns(
    runs: Mapping[str, Callable[[], Any]],
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[list[float]]]:
    """-> name -> the calls of each of its windows, in ms; the k-th windows of all lie in the same round.

    Ends when the interval of every median is small (`is_wide`), or after about `seconds` (SECONDS).
    """
    windows: dict[str, list[list[float]]] = {name: [] for name in runs}
    end = clock() + (SECONDS if seconds is None else seconds)
    order: Sequence[str] = list(runs)
    for number in range(1, MAX_ROUNDS + 1):
        for name in order:
            windows[name].append(_window(runs[name], clock))
        order = order[::-1]  # who runs behind whom changes
        settled = not any(is_wide(medians(found)) for found in windows.values())
        if number >= MIN_ROUNDS and (settled or clock() >= end):
            break
    return windows


def medians(windows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(calls) for calls in windows]


def _window(run: Callable[[], Any], clock: Callable[[], float]) -> list[float]:
    """-> ms of each call, after one that fills the caches again."""
    run()
    taken: list[float] = []
    start = clock()
    while len(taken) < WINDOW_CALLS or clock() - start < WINDOW_SECONDS:
        before = clock()
        run()
        taken.append(1e3 * (clock() - before))
    return taken
