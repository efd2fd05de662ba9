"""`ffl-predict merge FILE... --out FILE`: the parts that N machines made become the file of the whole run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ffl_deploy.command import Parser
from ffl_deploy.errors import DONE, SOME_INPUTS_FAILED, UsageError
from ffl_deploy.files import remove_abandoned, sha256_of
from ffl_deploy.manifest import FileRecord
from serve.inputs.items import Skipped
from serve.predict.labelled_report import LabelledReport
from serve.predict.part_file import PartRecord, part_path, read_part
from serve.predict.shards import ShardsManifest, shards_folder
from serve.predict.summary import (
    Summary,
    Totals,
    inputs_digest,
    require_own_files,
    screen,
    summarize,
    with_report,
    write_summary,
)
from serve.rows import assemble, header

EXAMPLES = ("ffl-predict merge a.parquet b.parquet c.parquet --out predictions.parquet",)
DESCRIPTION = """\
Put the parts of a run together (ffl-predict ... --part 1/3, 2/3, 3/3): the rows, their order and their bytes
are those of a run that was never divided. Beside each FILE its FILE.part.json is needed. Refused: a part that
is missing, doubled, unfinished or changed, and parts of different runs (another bundle, flags, versions or
list of inputs).

Exit: 0 all rows ok; 2 the parts do not make one run; 3 merged, some rows have errors.
"""


def build_parser() -> Parser:
    parser = Parser(
        "ffl-predict merge",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        examples=EXAMPLES,
    )
    parser.add_argument("parts", metavar="FILE", nargs="+", type=Path, help="the --out of each part")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="where all rows go")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--quiet", action="store_true", help="print errors only")
    output.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    check_merged(arguments.out, arguments.parts)
    run = merged_run(arguments.parts)
    summary, report = write_merged(run, arguments.out)
    if arguments.json:
        print(msgspec.json.encode(summary).decode())
    elif not arguments.quiet:
        print(screen(summary, report))
    return SOME_INPUTS_FAILED if summary.errors else DONE


def check_merged(out: Path, parts: Sequence[Path]) -> None:
    """Raise UsageError where `out` is no place for the result."""
    if out.exists() and not out.is_file():
        raise UsageError(f"{out} is a folder, a device or a pipe; give --out a file.")
    if shards_folder(out).exists():
        raise UsageError(
            f"an unfinished run is about to write {out} ({shards_folder(out)}); choose another --out."
        )
    require_own_files(out)
    for part in parts:
        if os.path.realpath(out) in (os.path.realpath(part), os.path.realpath(part_path(part))):
            raise UsageError(f"--out {out} would replace a part; choose another file.")


class PartFile(NamedTuple):
    """A part that was found whole: its rows, and its record."""

    file: Path
    number: int
    of: int
    record: PartRecord


def merged_run(files: Sequence[Path]) -> list[PartFile]:
    """-> the parts, by number. Raises UsageError unless they are all parts of one run, each of them once."""
    found: dict[int, PartFile] = {}
    first: PartFile | None = None
    for file in files:
        (number, of), record = read_part(file)
        part = PartFile(file, number, of, record)
        first = first or part
        if difference := difference_between(part, first):
            raise UsageError(f"{file} and {first.file} are parts of different runs: {difference}.")
        if number in found:
            raise UsageError(f"{file} and {found[number].file} are both part {number}/{of}; name each once.")
        found[number] = part
    assert first is not None  # argparse wants one
    missing = [f"{number}/{first.of}" for number in range(1, first.of + 1) if number not in found]
    if missing:
        named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        which = "a part is" if len(missing) == 1 else f"{len(missing)} parts are"
        raise UsageError(f"{which} missing ({named}); name the FILE of each part.")
    return [found[number] for number in sorted(found)]


def difference_between(one: PartFile, other: PartFile) -> str:
    """-> why two parts cannot be of one run; "" where they can."""
    pairs = [("the number of parts", one.of, other.of)]
    pairs += [
        (name, getattr(one.record.request, name), getattr(other.record.request, name))
        for name in type(one.record.request).__struct_fields__
    ]
    # streams and decoders may be as many as the machine has cores: the bytes do not depend on them
    pairs += [
        (name, getattr(one.record.settings, name), getattr(other.record.settings, name))
        for name in ("batch_size", "shard_size", "threads")
    ]
    pairs += [("the number of inputs", one.record.items, other.record.items)]
    for name, mine, theirs in pairs:
        if mine != theirs:
            return f"{name} is {mine} and {theirs}"
    if one.record.items_sha256 != other.record.items_sha256:
        return "the inputs have other names, another order or other labels"
    return ""


def write_merged(parts: Sequence[PartFile], out: Path) -> tuple[Summary, LabelledReport]:
    """Write what the whole run would have written; -> its summary and its report."""
    # the rows, shard by shard in the order of the inputs
    records = [part.record for part in parts]
    request, classes = records[0].request, records[0].classes
    shards = sorted((shard.index, number) for number, one in enumerate(records) for shard in one.shards)
    if [index for index, _ in shards] != list(range(len(shards))):
        raise UsageError("the parts do not hold every shard once; make them again.")
    remove_abandoned(out, "tmp")
    with ExitStack() as stack:
        pieces = [stack.enter_context(Pieces(part)) for part in parts]
        assemble((next(pieces[number]) for _, number in shards), out, request.format, request.columns)

    # what they amount to, counted as the run counts them: in the order of the shards
    totals = Totals()
    by_index = {shard.index: shard.record for one in records for shard in one.shards}
    for index, _ in shards:
        totals.add_record(index, by_index[index], resumed=False)
    skipped = Skipped()
    skipped.reasons.update(records[0].skipped)  # each machine has passed all of the inputs
    manifest = ShardsManifest(request, records[0].settings)
    summary = summarize(totals, manifest, out, skipped, max(one.seconds for one in records))
    rates = [one.images_per_second for one in records if one.images_per_second is not None]
    summary.images_per_second = round(sum(rates), 2) if rates else None
    summary.output = FileRecord(sha256_of(out), out.stat().st_size)
    summary.inputs_sha256 = inputs_digest(totals.inputs[index] for index in totals.shards)
    report = with_report(out, summary, totals, classes)
    write_summary(out, summary)
    return summary, report


class Pieces:
    """A part's shards, one after the other, as `rows.assemble` takes them."""

    def __init__(self, part: PartFile) -> None:
        self._part = part
        self._stack = ExitStack()

    def __enter__(self) -> Iterator[Any]:
        record = self._part.record
        file = self._stack.enter_context(self._part.file.open("rb"))
        if record.request.format == "parquet":
            return self._tables(file, [shard.record.rows for shard in record.shards])
        return self._lines(file, [shard.bytes for shard in record.shards])

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _lines(self, file: Any, sizes: Sequence[int]) -> Iterator[bytes]:
        request = self._part.record.request
        file.seek(len(header(request.format, request.columns)))
        for size in sizes:
            yield file.read(size)

    def _tables(self, file: Any, sizes: Sequence[int]) -> Iterator[Any]:
        import pyarrow.parquet as pq

        whole, group = pq.ParquetFile(file), 0
        for size in sizes:  # a shard is a row group, or several where it is longer than one may be
            groups, rows = [], 0
            while rows < size:
                groups.append(group)
                rows += whole.metadata.row_group(group).num_rows
                group += 1
            yield whole.read_row_groups(groups)
