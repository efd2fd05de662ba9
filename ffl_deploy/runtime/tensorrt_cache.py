"""TensorRT engines of this machine: built at first use, from the bundle's ONNX file, and kept in the user's
cache.

    ~/.cache/ffl-deploy/engines/KEY.engine  KEY.json   an engine, and what it was built by and for
                                SHA256.kernels         what TensorRT-RTX compiled of that engine for this GPU
                                KEY.timings            what TensorRT timed on this GPU, for the next build

KEY is the hash of everything that an engine depends on: the ONNX file, TensorRT's flavour and version, the
GPU's name and capability, the driver. An engine is native code: the folder is readable by this user alone,
one that others can write to is not used, and the record beside an engine holds its hash. Without such a
folder an engine is built for each process.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import sha256_of
from ffl_deploy.manifest import EngineRecord
from ffl_deploy.private_cache import make_room, private_folder, read_private, write_private
from ffl_deploy.runtime.gpu import Gpu, this_gpu
from ffl_deploy.runtime.tensorrt_build import BATCHES, EngineOptions, build
from ffl_deploy.runtime.tensorrt_modules import import_tensorrt, installed_flavour

try:
    import fcntl
except ImportError:  # Windows: two processes may build the same engine, and the last one stays
    fcntl = None  # type: ignore[assignment]

FOLDER = "engines"
FORMAT = 1  # of the cache; another number makes every engine be built again
MAX_FILES = 128  # the least recently used make room
MAX_BYTES = 8 << 30  # of an engine
MAX_RECORD_BYTES = 1 << 20
LOG = logging.getLogger("ffl_deploy.engines")


class Engine(NamedTuple):
    """An engine that TensorRtSession can open.

    name: in sentences; rebuild: what to do where it does not run here; place: its file, if it was kept.
    """

    content: bytes
    record: EngineRecord
    name: str
    rebuild: str
    place: Path | None = None

    @property
    def kernels(self) -> str:
        """-> the name of the file in which TensorRT-RTX leaves what it compiled."""
        return f"{hashlib.sha256(self.content).hexdigest()}.kernels"


class _Entry(msgspec.Struct, frozen=True):
    """KEY.json"""

    question: dict[str, Any]
    sha256: str
    record: EngineRecord


def bundled(model: Path, record: EngineRecord) -> Engine:
    """-> the engine of a bundle, which was built elsewhere or by ffl-export on this machine."""
    source = model.parent.parent / record.source
    rebuild = (
        f"build one here: ffl-engine {model.parent.parent}, or use {source.name} with --runtime "
        "onnxruntime-cuda"
    )
    return Engine(model.read_bytes(), record, model.name, rebuild)


def engine_here(source: Path, batches: tuple[int, ...] | None = None, again: bool = False) -> Engine:
    """-> an engine of the ONNX file `source` for this GPU: the one that was kept, else built now and kept.

    Args: batches: what to optimize it for (what is kept was made for, else BATCHES); again: build it in any
    case. Raises UsageError where TensorRT or a GPU is missing, CheckError where TensorRT refuses the file.
    """
    flavour, gpu = installed_flavour(), this_gpu()
    machine = _machine(flavour, gpu)
    question = _question(sha256_of(source), machine)
    folder = private_folder(FOLDER, make=True)
    key = _key(question)
    with _locked(folder, key):
        kept = None if folder is None or again else _kept(folder, question, source, batches)
        if kept is not None:
            return kept
        LOG.warning(
            "building a TensorRT engine of %s for %s, which takes a minute%s",
            source.name, gpu.name, "" if folder else " and cannot be kept: there is no private cache folder",
        )  # fmt: skip
        return _built(
            folder, source, question, machine, gpu, EngineOptions(flavour, None, batches or BATCHES)
        )


def is_kept(source_sha256: str) -> bool:
    """-> whether an engine for this GPU of the ONNX file with this hash was built before."""
    folder = private_folder(FOLDER)
    if folder is None:
        return False
    with contextlib.suppress(UsageError):  # no TensorRT, no GPU
        question = _question(source_sha256, _machine(installed_flavour(), this_gpu()))
        return (folder / f"{_key(question)}.json").is_file()
    return False


def _machine(flavour: str, gpu: Gpu) -> dict[str, Any]:
    version = str(import_tensorrt(flavour).__version__)
    described = [gpu.name, gpu.compute_capability, gpu.driver]
    return {"format": FORMAT, "tensorrt": [flavour, version], "gpu": described}


def _question(source_sha256: str, machine: dict[str, Any]) -> dict[str, Any]:
    """-> everything that an engine depends on."""
    return {"asks": "engine", "source": source_sha256, **machine}


def forget(engine: Engine) -> None:
    """Remove an engine that does not hold its gate."""
    if engine.place is not None:
        for path in (engine.place.with_suffix(".json"), engine.place):
            path.unlink(missing_ok=True)


def read_kernels(name: str) -> bytes | None:
    """-> what TensorRT-RTX compiled of an engine (`Engine.kernels`) for this GPU the last time, None where
    that is not known. It refuses itself what it compiled for another version, GPU or driver."""
    folder = private_folder(FOLDER)
    if folder is None:
        return None
    with contextlib.suppress(OSError):
        return read_private(folder / name, MAX_BYTES)
    return None


def keep_kernels(name: str, content: bytes) -> None:
    """Keep what TensorRT-RTX compiled; does nothing where that is not possible."""
    folder = private_folder(FOLDER, make=True)
    if folder is not None:
        with contextlib.suppress(OSError):
            write_private(folder / name, content)


def _built(
    folder: Path | None,
    source: Path,
    question: dict[str, Any],
    machine: dict[str, Any],
    gpu: Gpu,
    options: EngineOptions,
) -> Engine:
    """-> an engine that was built now, kept in `folder` with what was timed on the way."""
    timings = folder and folder / f"{_key({'asks': 'timings', **machine})}.timings"
    capabilities = (gpu.compute_capability,) if options.flavour == "tensorrt_rtx" else None
    known = None
    if timings:
        with contextlib.suppress(OSError):
            known = read_private(timings, MAX_BYTES)
    made = build(source, replace(options, timings=known, capabilities=capabilities))
    record = msgspec.structs.replace(made.record, gpu=gpu.name)
    if folder is None:
        return _engine(made.content, record, source, None)
    place = folder / f"{_key(question)}.engine"
    try:
        # the record last: without it there is no engine
        write_private(place, made.content)
        entry = _Entry(question, hashlib.sha256(made.content).hexdigest(), record)
        write_private(place.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(entry), indent=1))
        if timings and made.timings:
            write_private(timings, made.timings)
        make_room(folder, MAX_FILES)
    except OSError as error:  # full, or over its quota
        LOG.warning("the engine cannot be kept (%s); it is built again the next time", error.strerror)
        return _engine(made.content, record, source, None)
    return _engine(made.content, record, source, place)


def _kept(
    folder: Path, question: dict[str, Any], source: Path, batches: tuple[int, ...] | None
) -> Engine | None:
    """-> the engine that was kept for `question`, None where there is none, or one made for other batches."""
    place = folder / f"{_key(question)}.engine"
    try:
        described = read_private(place.with_suffix(".json"), MAX_RECORD_BYTES)
        entry = None if described is None else msgspec.json.decode(described, type=_Entry)
        content = None if entry is None else read_private(place, MAX_BYTES)
        if entry is None or content is None:
            return None
        if entry.question != question or hashlib.sha256(content).hexdigest() != entry.sha256:
            return None
        os.utime(place)
        os.utime(place.with_suffix(".json"))
    except (OSError, msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError):
        return None
    made_for = tuple(best for _, best, _ in entry.record.profiles)
    if batches is not None and len(made_for) > 1 and made_for != tuple(sorted(set(batches))):
        return None
    return _engine(content, entry.record, source, place)


def _engine(content: bytes, record: EngineRecord, source: Path, place: Path | None) -> Engine:
    name = f"the engine of {source.name}"
    return Engine(content, record, name, f"run: ffl-engine {source.parent}", place)


def _key(question: dict[str, Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(question, order="sorted")).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path | None, key: str) -> Iterator[None]:
    """Let one process at a time build what `key` stands for; the others then find it."""
    if folder is None or fcntl is None:
        yield
        return
    try:
        descriptor = os.open(folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise CheckError(
            f"{folder} cannot be written to ({error.strerror}); free some space or change its rights."
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
