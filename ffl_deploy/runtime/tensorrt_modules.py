"""TensorRT's two flavours as Python modules, and what they say while they work."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from ffl_deploy.errors import UsageError
from ffl_deploy.installed import missing

FLAVOURS = ("tensorrt", "tensorrt_rtx")
"""The names of the modules; the first one that is installed builds."""


def import_tensorrt(flavour: str) -> Any:
    """-> the module `tensorrt` or `tensorrt_rtx`. Raises UsageError where it is not installed."""
    if flavour not in FLAVOURS:
        raise UsageError(f"{flavour!r} is no flavour of TensorRT; known: {', '.join(FLAVOURS)}.")
    try:
        return importlib.import_module(flavour)
    except ImportError as error:
        raise missing(flavour) from error


def installed_flavour() -> str:
    """-> the flavour that is installed, `tensorrt` first. Raises UsageError where none is."""
    for flavour in FLAVOURS:
        if importlib.util.find_spec(flavour) is not None:
            return flavour
    raise missing("tensorrt", "take the extra tensorrt-rtx (GeForce and RTX; it builds without a GPU)")


def message_collector(trt: Any) -> Any:
    """-> a TensorRT logger that keeps messages instead of printing them: `errors` and `warnings`,
    lists of text.

    Builder and parser return None on failure; what went wrong is only in these messages.
    """

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)

    return Collector()


def one_line(messages: Sequence[str]) -> str:
    """-> the messages on one line, without repeats and without CUDA's complaint
    that a builder's machine has no GPU."""
    lines = [" ".join(line.split()) for message in messages for line in message.splitlines()]
    kept = [line for line in dict.fromkeys(lines) if line and "catchCudaError" not in line]
    return "; ".join(kept).rstrip(".") or "it gave no reason"
