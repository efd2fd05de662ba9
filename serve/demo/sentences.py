"""Sentences and tables on the page, announced to those who do not see it."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ffl_deploy.sets import SetLevel


def status(text: str) -> str:
    """-> HTML of how things stand."""
    return f'<p role="status">{html.escape(text)}</p>'


def problem(text: str) -> str:
    """-> HTML of what went wrong."""
    return f'<p role="alert" class="problem">{html.escape(text)}</p>'


def promise(promised: Mapping[str, Any], level: SetLevel | None) -> str:
    """-> Markdown behind a model's note: which exit of a cascade answered, whether the image is like those
    that it learned from, the set of classes, and whether it would rather not answer; nothing of what was not
    asked for."""
    by = f", answered by {promised['exit']}" if "exit" in promised else ""
    if promised.get("unfamiliar"):
        by += "\n\n**This is unlike the images that it learned from: perhaps none of its classes.**"
    if level is None:
        return by
    names = ", ".join(re.sub(r"([^\w\s])", r"\\\1", name) for name in promised["set"])
    kind = "of each kind of image" if len(level.thresholds) > 1 else "of images"
    unsure = "\n\n**Too unsure to answer.**" if promised["abstain"] else ""
    return f"{by}{unsure}\n\nIt is among these, for at least {100 * level.share:.0f} % {kind}: {names}."


def table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None = None
) -> str:
    """-> HTML of a table that scrolls sideways instead of breaking its words. marked: the row that stands
    out; columns in which no row has anything are left out."""
    kept = [n for n in range(len(columns)) if not rows or any(row[n] for row in rows)]
    head = "".join(f'<th scope="col">{html.escape(columns[n])}</th>' for n in kept)
    lines = ["".join(f"<td>{html.escape(row[n])}</td>" for n in kept) for row in rows]
    classes = ["" if number != marked else ' class="marked"' for number in range(len(rows))]
    body = "".join(f"<tr{kind}>{line}</tr>" for kind, line in zip(classes, lines, strict=True))
    name = html.escape(caption)
    return (
        f'<figure class="table"><figcaption>{name}</figcaption>'
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>"
    )
