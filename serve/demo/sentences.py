"""Sentences on the page, announced to those who do not see it."""

from __future__ import annotations

import html


def status(text: str) -> str:
    """-> HTML of how things stand."""
    return f'<p role="status">{html.escape(text)}</p>'


def problem(text: str) -> str:
    """-> HTML of what went wrong."""
    return f'<p role="alert" class="problem">{html.escape(text)}</p>'
