"""The folder FILE.parts: finished shards under a manifest,
so that an interrupted run goes on where it stopped.

    FILE.parts/  manifest.json  lock  000000.parquet  000000.json  000001.parquet  000001.json ...

A shard is finished when its record (the .json) is there: it is written after the rows, each through a
temporary name, fsync and rename. The record holds a hash of the inputs' names, so a resume over changed
inputs is refused instead of mixing two runs.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import sha256_of, write_atomically, write_json
from serve.pipeline import WorkSettings
from serve.predict.labelled import LabelCounts
from serve.rows import Format

MANIFEST = "manifest.json"
LOCK_PATIENCE = 2.0  # seconds; a killed run's worker needs a moment to go


class PredictRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was asked for. Two runs with the same request
    and settings over the same files give the same bytes."""

    bundle_sha256: str
    variant: str
    runtime: str
    format: Format
    top_k: int
    columns: list[str]
    inputs: list[str]
    options: dict[str, Any]  # of reading: column, label column, links
    toolchain: dict[str, str]


class ShardsManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    request: PredictRequest
    settings: WorkSettings


class ShardRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished shard, and what the closing summary needs to know of it."""

    rows: int
    sha256: str
    inputs_sha256: str
    statuses: dict[str, int]
    labels: dict[str, int]
    remarks: dict[str, int]
    labelled: LabelCounts


class ShardsFolder:
    """An open and locked FILE.parts."""

    def __init__(self, folder: Path, manifest: ShardsManifest) -> None:
        self.folder, self.manifest = folder, manifest

    def data_path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.{self.manifest.request.format}"

    def record(self, index: int) -> ShardRecord | None:
        """-> the record of a finished shard whose rows are intact, else None (it is then made again)."""
        path = self.folder / f"{index:06d}.json"
        if not path.is_file():
            return None
        try:
            record = msgspec.json.decode(path.read_bytes(), type=ShardRecord)
            intact = sha256_of(self.data_path(index)) == record.sha256
        except (msgspec.DecodeError, FileNotFoundError):
            return None
        return record if intact else None

    def commit(self, index: int, data: bytes, record: ShardRecord) -> None:
        """Write a shard; when this returns it survives a power cut."""
        write_atomically(self.data_path(index), data)
        write_atomically(self.folder / f"{index:06d}.json", msgspec.json.encode(record))

    def remove(self) -> None:
        """Remove the folder; call it once the output is complete."""
        shutil.rmtree(self.folder)


def shards_folder(out: Path) -> Path:
    return out.with_name(out.name + ".parts")


@contextlib.contextmanager
def open_shards(
    out: Path, request: PredictRequest, settings: Callable[[], WorkSettings], resume: bool
) -> Iterator[ShardsFolder]:
    """Lock and open FILE.parts, new or (with `resume`) as an interrupted run left it.

    Args: settings: called for a new run only; it may take time to measure.
    Raises UsageError: another process has it; it holds another run,
    or an unfinished one and `resume` was not asked for.
    """
    folder = shards_folder(out)
    with locked(folder):
        # of a run that was killed while it put the rows together
        for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
            left.unlink(missing_ok=True)
        try:
            manifest = _existing(folder, request, resume)
            if manifest is None:
                manifest = ShardsManifest(request, settings())
                write_json(folder / MANIFEST, manifest)
            yield ShardsFolder(folder, manifest)
        except BaseException:
            if not any(folder.glob("[0-9]*.json")):  # nothing worth a resume
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _existing(folder: Path, request: PredictRequest, resume: bool) -> ShardsManifest | None:
    """-> the manifest of the unfinished run to go on with, or None where there is none."""
    finished = sum(1 for _ in folder.glob("[0-9]*.json"))
    if not (folder / MANIFEST).is_file() or (finished == 0 and not resume):
        return None
    if not resume:
        raise UsageError(
            f"{folder} holds {finished} finished shards; add --resume to go on with them, or remove the "
            "folder to start again."
        )
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=ShardsManifest)
    except msgspec.DecodeError as error:
        raise CheckError(
            f"{folder / MANIFEST} is corrupt ({error}); remove {folder} and start again."
        ) from error
    for name in PredictRequest.__struct_fields__:
        before, now = getattr(manifest.request, name), getattr(request, name)
        if before != now:
            raise UsageError(
                f"{folder} belongs to a run with {name} = {before}, not {now}; "
                "repeat that command with --resume, or remove the folder."
            )
    return manifest


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`/lock, creating the folder. The lock ends with the process, however that ends.
    Raises UsageError."""
    import fcntl

    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / "lock", "w")  # noqa: SIM115 held until the end of the block below
        except FileNotFoundError:  # the run that had it has just finished and removed the folder
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"another process is writing {folder}; wait for it, or choose another --out."
                    ) from None
                time.sleep(0.05)
                continue
            if (folder / "lock").exists():
                yield
                return


def hash_names(names: Iterable[str]) -> str:
    """-> SHA-256 of a list of names."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\0")
    return digest.hexdigest()


def count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
