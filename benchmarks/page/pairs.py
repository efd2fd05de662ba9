"""Tables of accuracies and of their paired differences, for the pages that Python writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffl_deploy.markdown import table
from ffl_deploy.statistics import wilson_interval


def pair_table(pairs: list[dict[str, Any]]) -> str:
    """pairs: PairedDifferences as JSON, each with the names `one` and `other`; -> rows of other minus one."""
    rows = []
    for pair in pairs:
        low, high = (100 * pair["interval"][side] for side in ("low", "high"))
        rows.append(
            [
                pair["other"],
                pair["one"],
                f"{100 * pair['delta']:+.2f}",
                f"{low:+.2f} to {high:+.2f}",
                f"{pair['gained']} / {pair['lost']}",
                f"{pair['p_different']:.2g}",
            ]
        )
    return table(
        ["", "minus", "points", "95 % interval (Tango)", "right: only first / only second", "p"], rows
    )


def accuracy_table(accuracies: Mapping[str, float], images: int) -> str:
    """-> a row for each classifier's accuracy on so many test images."""
    rows = [
        [name, f"{share:.2%}", f"{low} to {high}"]
        for name, share in accuracies.items()
        for low, high in [wilson_of(share, images)]
    ]
    return table(["classifier", f"test accuracy ({images:,} images)", "95 % interval (Wilson)"], rows)


def wilson_of(share: float, images: int) -> tuple[str, str]:
    """-> the ends of an accuracy's 95 % interval."""
    interval = wilson_interval(round(share * images), images)
    return f"{interval.low:.2%}", f"{interval.high:.2%}"
