"""FILE.part.json: what `ffl-predict merge` has to know of a part that is finished."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ffl_deploy.errors import UsageError
from ffl_deploy.files import sha256_of, write_json
from ffl_deploy.manifest import FileRecord
from serve.pipeline import WorkSettings
from serve.predict.parts import Listing, Part, part_given
from serve.predict.shards import PredictRequest, ShardRecord, ShardsFolder, shards_folder
from serve.predict.summary import Summary


class PartShard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A shard of a part. bytes: that its rows take in a CSV or JSON lines file."""

    index: int
    bytes: int
    record: ShardRecord


class PartRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """FILE.part.json. `request` is the whole run's; items: of the whole list; seconds and images_per_second:
    of the session that finished the part."""

    part: str
    request: PredictRequest
    settings: WorkSettings
    classes: list[str]
    items: int
    items_sha256: str
    skipped: dict[str, int]
    output: FileRecord
    seconds: float
    images_per_second: float | None
    shards: list[PartShard]


def part_path(out: Path) -> Path:
    return out.with_name(out.name + ".part.json")


def whole(request: PredictRequest) -> PredictRequest:
    """-> the request without the part of it that was asked for here."""
    return msgspec.structs.replace(request, part=msgspec.UNSET)


def write_part(
    out: Path, part: Part, classes: Sequence[str], folder: ShardsFolder, listing: Listing, summary: Summary
) -> None:
    """Write what `ffl-predict merge` has to know of a part whose shards are all in `folder`."""
    assert summary.output is not msgspec.UNSET
    shards = []
    for index in range(part.next_from(0), -(-listing.items // folder.manifest.settings.shard_size), part.of):
        record = folder.record(index)
        assert record is not None, f"shard {index} was finished"
        size = folder.data_path(index).stat().st_size
        # each input's own hash is for a resume, and would be most of the file
        shards.append(PartShard(index, size, msgspec.structs.replace(record, inputs_each=msgspec.UNSET)))
    if not shards:
        logging.getLogger("ffl_deploy").warning(
            "part %s is empty, as %d inputs are too few; a smaller --shard-size (of every part) divides them",
            part,
            listing.items,
        )
    record_of_part = PartRecord(
        part=str(part),
        request=whole(folder.manifest.request),
        settings=folder.manifest.settings,
        classes=list(classes),
        items=listing.items,
        items_sha256=listing.sha256,
        skipped=summary.skipped,
        output=summary.output,
        seconds=summary.seconds,
        images_per_second=summary.images_per_second,
        shards=shards,
    )
    write_json(part_path(out), record_of_part)


def read_part(file: Path) -> tuple[Part, PartRecord]:
    """-> which part the rows of `file` are, and its record. Raises UsageError unless both are whole."""
    if not file.is_file():
        if shards_folder(file).is_dir():
            raise UsageError(f"{file} is not finished; run its command again with --resume.")
        raise UsageError(f"there is no file {file}; name the FILE of each --part.")
    try:
        record = msgspec.json.decode(part_path(file).read_bytes(), type=PartRecord)
        part = part_given(record.part)
    except FileNotFoundError:
        raise UsageError(
            f"{file} has no {part_path(file).name} beside it, which --part writes; copy both of each part."
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{part_path(file)} is not what --part writes ({error}).") from error
    if file.stat().st_size != record.output.bytes or sha256_of(file) != record.output.sha256:
        raise UsageError(
            f"{file} was changed since its part was finished, or not copied whole; copy it again, or make "
            f"--part {part} again."
        )
    return part, record
