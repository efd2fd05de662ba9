"""One header of a request: Starlette's `Headers` looks at all of them, and raises where there is none, which
every middleware of every request would pay for."""

from __future__ import annotations

from starlette.types import Scope


def header(scope: Scope, name: bytes) -> str | None:
    """-> the value of the first header of that name, which is given in small letters; None where there is
    none."""
    for given, value in scope["headers"]:
        if given == name:
            return str(value, "latin-1")
    return None
