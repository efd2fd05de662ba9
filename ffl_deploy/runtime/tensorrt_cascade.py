"""A cascade on TensorRT, which has no operator that finds rows: two engines in one file, and the rows that
are deferred gathered on the host.

The first engine takes images and gives the first exit's logits, the score that decides (`score`, [n]) and the
maps that the last exit goes on from (`map0`, `map1`, ...); the second one takes these maps of some rows.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np

from ffl_deploy.errors import CheckError
from ffl_deploy.manifest import Variant
from ffl_deploy.runtime.session import Outputs, Session
from ffl_deploy.runtime.tensorrt_cache import Engine
from ffl_deploy.runtime.tensorrt_runtime import TensorRtSession
from ffl_deploy.statistics import log_softmax

MAGIC = b"ffl cascade of two engines 1\n"
SCORE, MAP = "score", "map"
ROWS = "rows"
"""What the ONNX file calls the numbers of the deferred images, where it is cut in two."""


class Header(msgspec.Struct, frozen=True):
    """threshold: of the score, below which an image is deferred; temperature: of the probabilities; bytes: of
    the first engine, behind which the second one follows."""

    threshold: float
    temperature: float
    bytes: int


class Parts(NamedTuple):
    header: Header
    first: bytes
    last: bytes


def joined(parts: Parts) -> bytes:
    """-> the content of one file."""
    return MAGIC + msgspec.json.encode(parts.header) + b"\n" + parts.first + parts.last


def parted(content: bytes, name: str) -> Parts | None:
    """-> what `joined` was given; None where `content` is one engine. Raises CheckError where it is
    damaged."""
    if not content.startswith(MAGIC):
        return None
    text, _, engines = content[len(MAGIC) :].partition(b"\n")
    try:
        header = msgspec.json.decode(text, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckError(f"{name} is damaged ({error}); export the bundle again.") from error
    if not 0 < header.bytes < len(engines):
        raise CheckError(f"{name} is cut short; export the bundle again.")
    return Parts(header, engines[: header.bytes], engines[header.bytes :])


def open_engine(engine: Engine, variant: Variant) -> Session:
    """-> a session on an engine, or on the two of a cascade. Raises what TensorRtSession raises."""
    parts = parted(engine.content, engine.name)
    return TensorRtSession(engine, variant) if parts is None else CascadeEngines.of(engine, parts, variant)


class CascadeEngines(Session):
    """Both exits, each with its engine."""

    runtime = "tensorrt"

    def __init__(self, first: TensorRtSession, last: TensorRtSession, header: Header) -> None:
        self._first, self._last, self._header = first, last, header
        self.variant, self.computed, self.version = first.variant, first.computed, first.version
        self.device, self.gpu = first.device, first.gpu

    @classmethod
    def of(cls, engine: Engine, parts: Parts, variant: Variant) -> CascadeEngines:
        first = TensorRtSession(engine._replace(content=parts.first), variant)
        try:
            last = TensorRtSession(engine._replace(content=parts.last), variant)
        except BaseException:
            first.close()
            raise
        return cls(first, last, parts.header)

    def at(self, threshold: float) -> CascadeEngines:
        """-> the same engines with another threshold; `close` of either is that of both."""
        return CascadeEngines(
            self._first, self._last, msgspec.structs.replace(self._header, threshold=threshold)
        )

    def run(self, images: np.ndarray) -> Outputs:
        answered = self._first.compute({"images": images})
        logits, deferred = answered["logits"], answered[SCORE] < np.float32(self._header.threshold)
        rows = np.flatnonzero(deferred)
        if len(rows):
            maps = {name: values[rows] for name, values in answered.items() if name.startswith(MAP)}
            logits[rows] = self._last.compute(maps)["logits"]
        probabilities = np.exp(log_softmax(logits / np.float32(self._header.temperature)))
        return Outputs(logits, probabilities.astype(np.float32), exit=deferred.astype(np.int64))

    def warm_up_sizes(self, largest: int) -> list[int]:
        return self._first.warm_up_sizes(largest)

    def close(self) -> None:
        self._first.close()
        self._last.close()
