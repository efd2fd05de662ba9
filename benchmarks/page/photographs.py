"""The section of docs/results.md on a pair that started from published weights: photographs.md holds its
sentences, docs/results/photographs.json its values."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from benchmarks.page.fine_tuning import exported_files, file_table
from benchmarks.page.pairs import accuracy_table, pair_table
from ffl_deploy.arrays import read_arrays
from ffl_deploy.files import write_atomically
from ffl_deploy.markdown import fill
from ffl_deploy.run_directory import PREDICTIONS, SUMMARY, load_run
from ffl_deploy.statistics import paired_difference

PAGE, FILES = (Path(__file__).with_name(f"{name}.md") for name in ("photographs", "photographs_files"))
STORED = "photographs.json"
KEPT_DATA = ("image_size", "crop_fraction", "crop_padding", "mean", "std")


def collect(run_folder: Path, cpu_seconds: float, bundles: Path | None, stored: Path) -> None:
    """Store in the folder `stored` what a fine-tuned run reached, and the files of its export `bundles`.
    cpu_seconds: user and system time of the whole command, which a busy machine stretches least."""
    run, summary = load_run(run_folder), json.loads((run_folder / SUMMARY).read_text())
    arrays = read_arrays(run_folder / PREDICTIONS, ("labels",))
    right = {name: arrays[name] == arrays["labels"] for name in arrays if name != "labels"}
    pairs = [
        {"one": name, "other": "fused", **msgspec.to_builtins(paired_difference(right[name], right["fused"]))}
        for name in right
        if name != "fused"
    ]
    exported = [] if bundles is None else [name for name in summary["accuracy"] if (bundles / name).is_dir()]
    files, machine = ([], "") if bundles is None else exported_files(bundles, exported)
    options = run.config.options
    kept = {name: options["data"][name] for name in KEPT_DATA}
    content = {
        "data": kept,
        "model": {name: options["model"][name] for name in ("branches", "freeze", "head_epochs")},
        "optimisation": options["optimisation"],
        "images_per_class": run.config.split["images_per_class"],
        "summary": {
            key: summary[key]
            for key in ("epochs", "best_epoch", "seconds", "accuracy", "test_images", "recall")
        },
        "cpu_seconds": round(cpu_seconds),
        "toolchain": run.config.toolchain,
        "pairs": pairs,
        "files": files,
        "machine": machine,
    }
    write_atomically(stored / STORED, json.dumps(content, indent=1) + "\n")


def text(stored: Path) -> str:
    """-> the section; nothing where no such run was stored."""
    if not (stored / STORED).is_file():
        return ""
    content = json.loads((stored / STORED).read_text())
    summary, data, model = content["summary"], content["data"], content["model"]
    files = ""
    if content["files"]:
        files = fill(FILES, files=file_table(content["files"]), machine=content["machine"])
    counts = {part: sum(numbers) for part, numbers in content["images_per_class"].items()}
    return fill(
        PAGE,
        branches=" + ".join(model["branches"]),
        train=f"{counts['train']:,}",
        validation=f"{counts['validation']:,}",
        size=str(data["image_size"]),
        freeze=str(model["freeze"]),
        epochs=str(summary["epochs"]),
        best_epoch=str(summary["best_epoch"]),
        cpu_minutes=f"{content['cpu_seconds'] / 60:.1f}",
        threads=str(content["toolchain"]["threads"]),
        precision=content["toolchain"]["precision"],
        accuracy=accuracy_table(summary["accuracy"], summary["test_images"]),
        pairs=pair_table(content["pairs"]),
        recall=", ".join(f"{name} {share:.0%}" for name, share in summary["recall"]["fused"].items()),
        files=files,
    ).rstrip()
