"""A table of paired differences, for the pages that Python writes."""

from __future__ import annotations

from typing import Any

from ffl_deploy.markdown import table


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
