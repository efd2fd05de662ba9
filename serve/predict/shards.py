"""The folder FILE.parts: finished shards under a manifest,
so that an interrupted run goes on where it stopped.

    FILE.parts/  manifest.json  lock  000000.parquet  000000.json  000001.parquet  000001.json ...

A shard is finished when its record (the .json) is there: it is written after the rows, each through a
temporary name, fsync and rename. The record holds a hash of its inputs (names, labels, sizes, times), so a
resume over changed inputs is refused instead of mixing two runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import msgspec

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import make_folders, remove_abandoned, sha256_of, write_atomically, write_json
from serve.inputs.items import Item, identity
from serve.pipeline import WorkSettings
from serve.predict.labelled import LabelCounts
from serve.rows import Format

MANIFEST = "manifest.json"
LOCK = "lock"
OWN = re.compile(
    rf"({MANIFEST}|{LOCK}|[0-9]{{6,}}\.(json|jsonl|csv|parquet)|\.({MANIFEST}|[0-9]{{6,}}\.[a-z]+)\.[0-9a-f]+\.tmp)"
)
"""Every name that a file in FILE.parts can have; a folder that holds another is not ours."""
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
    sets: str | msgspec.UnsetType = msgspec.UNSET  # the level of --sets, where it was asked for
    part: str | msgspec.UnsetType = msgspec.UNSET  # of --part, where not all was asked for


class ShardsManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    request: PredictRequest
    settings: WorkSettings


class InputsHash(NamedTuple):
    """Of a shard's items in their order. each: four bytes of every item's own, in hex: to name the one that
    changed."""

    sha256: str
    each: str


class ShardRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished shard, and what the closing summary needs to know of it."""

    rows: int
    sha256: str
    inputs_sha256: str
    statuses: dict[str, int]
    labels: dict[str, int]
    remarks: dict[str, int]
    labelled: LabelCounts
    inputs_each: str | msgspec.UnsetType = msgspec.UNSET  # not of earlier versions, which hashed names alone


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
        # what a killed writer left goes with the folder: to look for it among thousands of shards takes time
        write_atomically(self.data_path(index), data, tidy=False)
        write_atomically(self.folder / f"{index:06d}.json", msgspec.json.encode(record), tidy=False)

    def remove(self) -> None:
        """Remove the folder; call it once the output is complete."""
        remove_own(self.folder)


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
        remove_abandoned(out, "tmp")  # of a run that was killed while it put the rows together
        try:
            manifest = _existing(folder, request, resume)
            if manifest is None:
                manifest = ShardsManifest(request, settings())
                write_json(folder / MANIFEST, manifest)
            yield ShardsFolder(folder, manifest)
        except BaseException:
            if not any(folder.glob("[0-9]*.json")):  # nothing worth a resume
                remove_own(folder)
            raise


def foreign(folder: Path) -> list[str]:
    """-> names in FILE.parts that no run of ours gives a file."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if not OWN.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False)
    )


def remove_own(folder: Path) -> None:
    """Remove our files from `folder`, and then the folder, unless something else is in it."""
    others = foreign(folder)
    for name in set(os.listdir(folder)) - set(others) - {LOCK}:
        (folder / name).unlink(missing_ok=True)
    (folder / LOCK).unlink(missing_ok=True)  # last: who waits for it begins anew then
    if not others:
        # another run has put its lock there meanwhile, or the folder is gone
        with contextlib.suppress(OSError):
            folder.rmdir()


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
            before, now = ("none" if value is msgspec.UNSET else value for value in (before, now))
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
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise UsageError(f"{folder} is a link or a file; move it away, or choose another --out.")
        make_folders(folder)
        try:
            others = foreign(folder)
            if others:
                raise UsageError(
                    f"{folder} holds what is not of ffl-predict ({', '.join(others[:3])}); move it away, or "
                    "choose another --out."
                )
            descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the run that had it has just finished and removed the folder
            continue
        with os.fdopen(descriptor, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"another process is writing {folder}; wait for it, or choose another --out."
                    ) from None
                time.sleep(0.05)
                continue
            if _same_file(file, folder / LOCK):
                yield
                return


def _same_file(file: TextIO, path: Path) -> bool:
    """-> whether the open `file` is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


class InputsHasher:
    """Takes in a shard's items as they pass."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._each: list[str] = []

    def passing(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`, each taken in before it is read."""
        for item in items:
            one = hashlib.sha256(identity(item)).digest()
            self._whole.update(one)
            self._each.append(one[:4].hex())
            yield item

    def result(self) -> InputsHash:
        return InputsHash(self._whole.hexdigest(), "".join(self._each))


def changed_item(items: Iterable[Item], before: InputsHash) -> str:
    """-> the name of the first item that is another one than `before`; "" where all are the same."""
    hasher, position = InputsHasher(), 0
    for position, item in enumerate(hasher.passing(items), start=1):
        if not before.each.startswith(hasher._each[-1], 8 * (position - 1)):
            return item.path
    if 8 * position < len(before.each):
        return f"input {position + 1}"
    return "" if hasher.result() == before else "an input"


def count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
