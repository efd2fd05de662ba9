"""The section of docs/results.md on a student under a teacher (--teacher): teacher.md holds its sentences,
docs/results/teacher.json its values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import msgspec

from benchmarks.page.pairs import pair_table
from ffl_deploy.arrays import read_arrays
from ffl_deploy.errors import UsageError
from ffl_deploy.files import write_atomically
from ffl_deploy.markdown import fill
from ffl_deploy.run_directory import PREDICTIONS, SUMMARY, Run, load_run
from ffl_deploy.statistics import paired_difference

PAGE, VALUES = Path(__file__).with_name("teacher.md"), "teacher.json"
STUDENT = "branch0"  # the classifier of a network alone


def collect(teacher: Path, students: Sequence[Path], stored: Path) -> None:
    """Store in the folder `stored` how students under `teacher` compare with themselves alone.

    students: runs in pairs, alone and taught, each pair of one seed. Raises UsageError for others.
    """
    if not students or len(students) % 2 == 1:
        raise UsageError("--taught takes the teacher's run, then runs in pairs: alone, taught.")
    both = zip(students[::2], students[1::2], strict=True)
    pairs = [compared(load_run(alone), load_run(taught)) for alone, taught in both]
    taught_by, one = load_run(teacher), load_run(students[0])
    summary, options = summary_of(taught_by), one.config.options
    content = {
        "teacher": {
            "branches": taught_by.config.options["model"]["branches"],
            "subject": taught_by.model.strong,
            "accuracy": summary["accuracy"][taught_by.model.strong],
            "epochs": summary["epochs"],
        },
        "branches": options["model"]["branches"],
        "recipe": options["recipe"],
        "epochs": options["optimisation"]["epochs"],
        "toolchain": one.config.toolchain,
        "pairs": pairs,
    }
    write_atomically(stored / VALUES, json.dumps(content, indent=1) + "\n")


def compared(alone: Run, taught: Run) -> dict[str, Any]:
    """-> the difference of the two on the same test images. Raises UsageError where they differ by more than
    the teacher."""
    mine, theirs = alone.config.options, taught.config.options
    same = all(mine[name] == theirs[name] for name in ("seed", "recipe", "optimisation", "data"))
    if not same or mine["model"]["teacher"] is not None or theirs["model"]["teacher"] is None:
        raise UsageError(
            f"{alone.folder} and {taught.folder} are no pair: they have to be of one seed, recipe and "
            "schedule, the first without --teacher, the second with it."
        )
    right = []
    for run in (alone, taught):
        arrays = read_arrays(run.folder / PREDICTIONS, (STUDENT, "labels"))
        right.append(arrays[STUDENT] == arrays["labels"])
    difference = paired_difference(*right)
    return {"seed": mine["seed"], **msgspec.to_builtins(difference)}


def summary_of(run: Run) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.folder / SUMMARY).read_text())
    return content


def text(stored: Path) -> str:
    """-> the section; nothing where no such runs were stored."""
    if not (stored / VALUES).is_file():
        return ""
    content = json.loads((stored / VALUES).read_text())
    teacher, pairs, toolchain = content["teacher"], content["pairs"], content["toolchain"]
    shown = [
        {
            **pair,
            "one": f"alone, {pair['reference_accuracy']:.2%}",
            "other": f"seed {pair['seed']}: taught, {pair['candidate_accuracy']:.2%}",
        }
        for pair in pairs
    ]
    return fill(
        PAGE,
        student=" + ".join(content["branches"]),
        branches=",".join(content["branches"]),
        recipe=content["recipe"],
        epochs=str(content["epochs"]),
        teacher=" + ".join(teacher["branches"]),
        subject=teacher["subject"],
        teacher_accuracy=f"{teacher['accuracy']:.2%}",
        teacher_epochs=str(teacher["epochs"]),
        device=toolchain["device"],
        precision=toolchain["precision"],
        pairs=pair_table(shown),
        verdict=verdict(pairs),
    ).rstrip()


def verdict(pairs: Sequence[dict[str, Any]]) -> str:
    """-> a sentence on all seeds."""
    better = sum(pair["delta"] > 0 for pair in pairs)
    surely = sum(pair["interval"]["low"] > 0 for pair in pairs)
    points = 100 * mean(pair["delta"] for pair in pairs)
    return (
        f"The taught student is better in {better} of {len(pairs)} seeds, by {points:+.2f} points on "
        f"average; in {surely} of them the interval of the difference is above 0."
    )
