"""Pages in Markdown: a template holds the sentences, Python the values; tables and numbers look alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

NOT_MEASURED = "-"


def fill(template: Path, **values: str) -> str:
    """-> the text of the file `template`, each `$name` in it replaced by its value.

    A value may be empty: a paragraph that holds nothing else goes, with the blank line behind it.
    Raises ValueError where names and values are not the same, so that neither is forgotten.
    """
    page = Template(template.read_text(encoding="utf-8"))
    if unmatched := set(page.get_identifiers()) ^ values.keys():
        raise ValueError(f"{template.name}: a name without a value, or a value without a name: {unmatched}")
    return re.sub(r"\n{3,}", "\n\n", page.substitute(values))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """-> a table, without a newline at its end. Raises ValueError for a row of another length than
    `header`."""
    lines = [_line(header), "|" + "---|" * len(header)]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{len(row)} cells under {len(header)} headings: {row}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def percent(share: float | None, digits: int = 2) -> str:
    """-> a share of 1 as "71.80 %"; a dash where there is none."""
    return NOT_MEASURED if share is None else f"{100 * share:.{digits}f} %"


def within(low: float | None, high: float | None) -> str:
    """-> the ends of an interval of shares, in percent: "70.91 to 72.67"."""
    return f"{100 * (low or 0):.2f} to {100 * (high or 0):.2f}"


def megabytes(size: int) -> str:
    """-> bytes as a number of MB (10^6 bytes)."""
    return f"{size / 1e6:.2f}"
