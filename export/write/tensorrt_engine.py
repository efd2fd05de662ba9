"""A TensorRT engine as a file of a bundle, with its record beside it."""

from __future__ import annotations

from pathlib import Path

from ffl_deploy.files import write_atomically, write_json
from ffl_deploy.manifest import EngineRecord
from ffl_deploy.runtime.tensorrt_build import EngineOptions, build


def write_engine(source: Path, path: Path, options: EngineOptions) -> EngineRecord:
    """Build `path` from the ONNX file `source`, with its record beside it (`path` with suffix .json).

    Raises CheckError where TensorRT refuses, UsageError where a capability is not known to it.
    """
    made = build(source, options)
    write_atomically(path, made.content)
    write_json(path.with_suffix(".json"), made.record)
    return made.record
