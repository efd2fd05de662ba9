"""What ffl-predict leaves on disk, byte for byte as it was before these records had types:
`stored/` was written then."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from serve.inputs.items import Skipped
from serve.pipeline import WorkSettings
from serve.predict.labelled import count_labels
from serve.predict.labelled_report import LabelledReport, make_report, report_path, write_report
from serve.predict.shards import PredictRequest, ShardRecord, ShardsFolder, ShardsManifest, open_shards
from serve.predict.summary import Summary, Totals, summarize, summary_path, write_summary
from serve.rows import Row

STORED = Path(__file__).with_name("stored")
CLASSES = ["cat", "dog", "frog"]
ANIMATED = "animated: only the first frame was classified"
ROWS = [
    Row("a.jpg", "ok", None, "cat", 0, 0.75, ["cat", "dog"], [0.75, 0.2], 32, 24),
    Row("b.jpg", "ok", ANIMATED, "dog", 1, 0.5, ["dog", "cat"], [0.5, 0.3], 48, 40),
    Row("c.jpg", "ok", None, "cat", 0, 0.1, ["cat", "frog"], [0.1, 0.05], 10, 10),
    Row("d.jpg", "empty", "the file is empty"),
    Row("e.jpg", "ok", None, "frog", 2, 1.0, ["frog", "cat"], [1.0, 0.0], 10, 10),
]
LABELS = ["cat", "cat", "2", "dog", "bird"]  # a name, another, a number, of a row without prediction, unknown
REQUEST = PredictRequest(
    bundle_sha256="ab" * 32,
    variant="fp32",
    runtime="onnxruntime",
    format="jsonl",
    top_k=2,
    columns=["logits"],
    inputs=["photos"],
    options={"column": None, "label_column": "class", "follow_links": False},
    toolchain={"pillow": "12.0.0", "onnxruntime": "1.23"},
)
SETTINGS = WorkSettings(batch_size=4, shard_size=100, streams=2, threads=1, decoders=2)


def shard_record(labelled: bool) -> ShardRecord:
    return ShardRecord(
        rows=5,
        sha256="cd" * 32,
        inputs_sha256="ef" * 32,
        statuses={"empty": 1, "ok": 4},
        labels={"cat": 2, "dog": 1, "frog": 1},
        remarks={ANIMATED: 1},
        labelled=count_labels(ROWS, LABELS if labelled else [None] * len(ROWS), CLASSES),
    )


@pytest.mark.parametrize("kind", ["labelled", "unlabelled", "empty"])
def test_summary_and_report_are_written_byte_for_byte_as_before(kind: str, tmp_path: Path) -> None:
    # one shard of this session, one of an earlier one; of the empty run not even those
    totals = Totals()
    if kind != "empty":
        totals.add_record(0, shard_record(kind == "labelled"), resumed=False)
        totals.add_record(1, shard_record(kind == "labelled"), resumed=True)
        totals.add_timing([0.001, 0.002, 0.0101], [0.05, 0.2])
    skipped = Skipped()
    skipped.reasons.update({"symbolic links": 2, "files without an image suffix": 1})

    summary = summarize(
        totals, ShardsManifest(REQUEST, SETTINGS), Path("out") / f"{kind}.jsonl", skipped, 2.3456
    )
    report = make_report(totals.labelled, CLASSES, top_k=2)
    out = tmp_path / kind
    if kind == "labelled":
        write_report(out, report, totals.labelled, CLASSES)
        summary.labelled = report.numbers()
        assert report_path(out).read_bytes() == (STORED / f"{kind}.report.json").read_bytes()
    write_summary(out, summary)
    assert summary_path(out).read_bytes() == (STORED / f"{kind}.summary.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "type"),
    [
        ("labelled.summary.json", Summary),
        ("unlabelled.summary.json", Summary),
        ("empty.summary.json", Summary),
        ("labelled.report.json", LabelledReport),
        ("manifest.json", ShardsManifest),
    ],
)
def test_a_stored_file_is_read_whole(name: str, type: Any) -> None:
    before = (STORED / name).read_bytes()
    again = msgspec.json.encode(msgspec.json.decode(before, type=type))
    assert msgspec.json.format(again, indent=2) + b"\n" == before


def test_an_interrupted_run_of_before_is_opened_with_its_finished_shard(tmp_path: Path) -> None:
    folder = tmp_path / "run.jsonl.parts"
    folder.mkdir()
    shutil.copy(STORED / "manifest.json", folder)
    shutil.copy(STORED / "record.json", folder / "000000.json")

    def no_settings() -> WorkSettings:
        raise AssertionError("those of the stored run hold")

    with open_shards(tmp_path / "run.jsonl", REQUEST, no_settings, resume=True) as shards:
        assert shards.manifest == ShardsManifest(REQUEST, SETTINGS)
        assert shards.record(0) is None  # its rows are not there, so it is made again

    # and what is written now is what was written then
    new = ShardsFolder(tmp_path, ShardsManifest(REQUEST, SETTINGS))
    new.commit(0, b"{}\n", shard_record(labelled=True))
    assert (tmp_path / "000000.json").read_bytes() == (STORED / "record.json").read_bytes()
    with open_shards(tmp_path / "new.jsonl", REQUEST, lambda: SETTINGS, resume=False):
        assert (tmp_path / "new.jsonl.parts/manifest.json").read_bytes() == (
            STORED / "manifest.json"
        ).read_bytes()
