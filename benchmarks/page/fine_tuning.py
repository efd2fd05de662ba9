"""The section of docs/results.md on the run that was fine-tuned for int8: fine_tuning.md holds its sentences,
docs/results/fine-tuning.json its values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.page.pairs import pair_table
from ffl_deploy.arrays import read_arrays
from ffl_deploy.bundle import load_bundle
from ffl_deploy.files import write_atomically
from ffl_deploy.manifest import AccuracyRecord
from ffl_deploy.markdown import fill, megabytes, percent, table
from ffl_deploy.run_directory import PREDICTIONS, SUMMARY, load_run
from ffl_deploy.statistics import paired_difference

PAGE = Path(__file__).with_name("fine_tuning.md")
STORED = "fine-tuning.json"


def collect(run_folder: Path, before: Path, bundles: Path, stored: Path) -> None:
    """Store in the folder `stored` what became of the run `before` in `run_folder`, image by image, and of
    that one in the files of its export `bundles`."""
    run, summary = load_run(run_folder), json.loads((run_folder / SUMMARY).read_text())
    old, new = (read_arrays(folder / PREDICTIONS, ("labels",)) for folder in (before, run_folder))
    pairs = [
        {"one": f"{name} before", "other": f"{name} after", **msgspec.to_builtins(pair)}
        for name in new
        if name in old and name != "labels"
        for pair in [paired_difference(old[name] == old["labels"], new[name] == new["labels"])]
    ]
    files, machine = exported_files(bundles, summary["accuracy"])
    content = {
        "optimisation": run.config.options["optimisation"],
        "summary": {key: summary[key] for key in ("epochs", "seconds", "accuracy", "test_images")},
        "toolchain": run.config.toolchain,
        "pairs": pairs,
        "files": files,
        "machine": machine,
    }
    write_atomically(stored / STORED, json.dumps(content, indent=1) + "\n")


def exported_files(bundles: Path, targets: Iterable[str]) -> tuple[list[dict[str, Any]], str]:
    """-> of every variant that was held to the test images its size and accuracy, and the machine that was
    timed."""
    files, machine = [], ""
    for target in targets:
        for variant in load_bundle(bundles / target).manifest.variants:
            if variant.accuracy is not None:
                files.append({
                    "target": target,
                    "variant": variant.name,
                    "bytes": (bundles / target / variant.file).stat().st_size,
                    "accuracy": msgspec.to_builtins(variant.accuracy),
                })  # fmt: skip
            machine = variant.latency.machine if variant.latency else machine
    return files, machine


def text(stored: Path) -> str:
    """-> the section; nothing where no fine-tuned run was stored."""
    if not (stored / STORED).is_file():
        return ""
    content = json.loads((stored / STORED).read_text())
    summary, options, toolchain = content["summary"], content["optimisation"], content["toolchain"]
    return fill(
        PAGE,
        epochs=str(summary["epochs"]),
        batch=str(options["batch_size"]),
        lr=f"{options['lr']:g}",
        minutes=f"{summary['seconds'] / 60:.0f}",
        threads=str(toolchain["threads"]),
        precision=toolchain["precision"],
        pairs=pair_table(content["pairs"]),
        files=file_table(content["files"]),
        machine=content["machine"],
    ).rstrip()


def file_table(files: list[dict[str, Any]]) -> str:
    rows = []
    for file in files:
        record = msgspec.convert(file["accuracy"], AccuracyRecord)
        low, high = 100 * record.difference.interval.low, 100 * record.difference.interval.high
        rows.append([
            file["target"],
            file["variant"],
            megabytes(file["bytes"]),
            percent(record.value),
            f"{100 * record.difference.delta:+.2f} [{low:+.2f}, {high:+.2f}]",
            percent(record.top1_agreement),
        ])  # fmt: skip
    return table(["target", "variant", "MB", "accuracy", "points (95 %, Tango)", "agreement"], rows)
