"""A TensorRT engine as a file of a bundle, with its record beside it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import msgspec

from export.write.cascade_graph import write_halves
from ffl_deploy.files import sha256_of, write_atomically, write_json
from ffl_deploy.manifest import EngineRecord
from ffl_deploy.runtime.tensorrt_build import EngineOptions, build
from ffl_deploy.runtime.tensorrt_cascade import Header, Parts, joined


class Routing(NamedTuple):
    """What the host needs to know of a cascade."""

    threshold: float
    temperature: float
    exits: tuple[str, str]


def write_engine(
    source: Path, path: Path, options: EngineOptions, routing: Routing | None = None
) -> EngineRecord:
    """Build `path` from the ONNX file `source`, with its record beside it (`path` with suffix .json); of a
    cascade, which has a `routing`, two engines in that file.

    Raises CheckError where TensorRT refuses, UsageError where a capability is not known to it.
    """
    if routing is None:
        made = build(source, options)
        content, record = made.content, made.record
    else:
        content, record = _two_engines(source, options, routing)
    write_atomically(path, content)
    write_json(path.with_suffix(".json"), record)
    return record


def _two_engines(source: Path, options: EngineOptions, routing: Routing) -> tuple[bytes, EngineRecord]:
    with tempfile.TemporaryDirectory() as folder:
        first, last = (build(half, options) for half in write_halves(source, Path(folder)))
    header = Header(routing.threshold, routing.temperature, len(first.content))
    record = msgspec.structs.replace(
        first.record,
        source=source.name,
        source_sha256=sha256_of(source),
        build_seconds=round(first.record.build_seconds + last.record.build_seconds, 3),
        exits=list(routing.exits),
        log=[*first.record.log, *last.record.log],
    )
    return joined(Parts(header, first.content, last.content)), record
