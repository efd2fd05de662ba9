"""The gates of a cascade beside those of every target: each exit alone, and the routing between them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from export.cascade import Exits
from export.check.evaluation import Reference
from export.check.gates import ACCURACY_BATCH
from export.write.cascade_graph import ALL, NONE, write_threshold
from ffl_deploy.data.datasets import Split
from ffl_deploy.errors import CheckError
from ffl_deploy.manifest import CascadeTimes, Variant
from ffl_deploy.parity import PARITY_GATES, judge
from ffl_deploy.runtime import Session, runtime_named
from ffl_deploy.runtime.replay import images_at_once, measure, run_in_batches
from ffl_deploy.runtime.tensorrt_cascade import CascadeEngines

TIMED = {1: 128, 64: 4}
"""Batch size -> how many batches of test images are timed in a turn."""
TURNS = 3


def opener(session: Session, path: Path, variant: Variant, folder: Path) -> Callable[[float], Session]:
    """-> what opens the cascade of `session` with another threshold; path: its file, where that is ONNX."""
    if isinstance(session, CascadeEngines):
        return session.at
    return lambda threshold: open_with(path, threshold, variant, folder)


def open_with(path: Path, threshold: float, variant: Variant, folder: Path) -> Session:
    """-> a session on the cascade `path` with another threshold; the file lies in `folder`."""
    other = write_threshold(path, folder / f"{threshold:g}.onnx", threshold)
    return runtime_named(variant.runtime).open(other, variant, None)


def exit_logits(path: Path, variant: Variant, images: Split) -> Exits:
    """-> what both exits of the cascade `path` answer to every image."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = [open_with(path, threshold, variant, Path(folder)) for threshold in (NONE, ALL)]
        first, last = (
            run_in_batches(session.run, images.read, len(images), ACCURACY_BATCH).logits
            for session in sessions
        )
    return Exits(first, last)


def check_exits(
    session: Session,
    path: Path,
    variant: Variant,
    reference: Reference,
    expected: Exits,
    names: tuple[str, str],
    precision: str,
    temperature: float,
) -> None:
    """Hold both exits of the cascade `path` to the gate of `precision`, each on all reference images,
    whichever would answer them. Raises CheckError."""
    gate = PARITY_GATES[precision]
    with tempfile.TemporaryDirectory() as folder:
        open_at = opener(session, path, variant, Path(folder))
        for name, threshold, logits in zip(names, (NONE, ALL), expected, strict=True):
            one = open_at(threshold)
            most = images_at_once(*reference.images.shape[:3])
            sizes = sorted({1, min(7, most), most})
            verdict = judge(measure(one.run, reference.images, logits, sizes, temperature), gate)
            if verdict.failed:
                raise CheckError(
                    f"variant {variant.name}: its exit {name} does not give PyTorch's logits: "
                    f"{verdict.findings[0]}."
                )


def exit_agreement(session: Session, images: np.ndarray, expected: np.ndarray, precision: str) -> float:
    """-> share of the reference images [n, h, w, 3] that leave by PyTorch's exit, int64 [n].
    Raises CheckError where one does not in fp32, or there is no output for it."""
    outputs = run_in_batches(session.run, images.__getitem__, len(images), ACCURACY_BATCH)
    if outputs.exit is None:
        raise CheckError(f"variant {session.variant} gives no output exit.")
    same = float((outputs.exit == expected).mean())
    if precision == "fp32" and same < 1:
        raise CheckError(
            f"variant {session.variant} sends {100 * (1 - same):.2g} % of the reference images to another "
            "exit than PyTorch."
        )
    return same


def exit_times(session: Session, path: Path, variant: Variant, test: Split) -> list[CascadeTimes]:
    """-> mean times of the cascade on test images, and of the same with every image deferred, in turns."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        runs = (session.run, opener(session, path, variant, Path(folder))(ALL).run)
        for batch, count in TIMED.items():
            rows = np.linspace(0, len(test) - 1, batch * count).round().astype(np.int64)
            images = test.read(np.random.default_rng(0).permutation(rows))
            batches = [images[start : start + batch] for start in range(0, len(images), batch)]
            seconds = [0.0, 0.0]
            for run in runs:
                run(batches[0])
            for part in batches * TURNS:
                for number, run in enumerate(runs):
                    began = time.perf_counter()
                    run(part)
                    seconds[number] += time.perf_counter() - began
            cascade, last = (round(1000 * one / (len(batches) * TURNS), 4) for one in seconds)
            times.append(CascadeTimes(batch, cascade, last))
    return times
