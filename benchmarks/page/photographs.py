"""The section of docs/results.md on pairs that started from published weights: photographs*.md hold its
sentences, docs/results/photographs-DATA.json its values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.page.fine_tuning import exported_files, file_table
from benchmarks.page.pairs import accuracy_table, pair_table
from ffl_deploy.arrays import read_arrays
from ffl_deploy.errors import UsageError
from ffl_deploy.files import write_atomically
from ffl_deploy.markdown import fill
from ffl_deploy.run_directory import PREDICTIONS, SUMMARY, load_run
from ffl_deploy.statistics import paired_difference

PAGE, RUN, FILES = (Path(__file__).with_name(f"photographs{part}.md") for part in ("", "_run", "_files"))


class Images(NamedTuple):
    """What a run learned from: the section's title, and what else is known of such images."""

    title: str
    comparison: str


DATA = {
    "flowers": Images(
        "Five kinds of flowers",
        "The commands are those of that page; at 96 pixels the pair reached 85.6 %, at 160 pixels 87.8 %, "
        "and a pair of resnet32 that starts from nothing reaches 65 % there. With so few test images the "
        "intervals below are wide, and so is that of the validation accuracy which the epoch was chosen by.",
    ),
    "cifar100": Images(
        "All of CIFAR-100",
        "`ffl-train --data CIFAR100 --weights branch0=LITE0.pth,branch1=LITE1.pth --image-size 96 "
        "--crop-fraction 1 --freeze 3 --head-epochs 0 --epochs 3 --validation 0.06 --calibration-split 0.667 "
        "--threads 1`. The pair of resnet32 at the top of this page, which starts from nothing and took two "
        "threads an hour, is right of 71.6 % (fused) and 70.4 % (branch0).",
    ),
}
LISTED = 10  # recalls of more classes than these are not all listed
KEPT_DATA = ("image_size", "crop_fraction", "crop_padding", "mean", "std")


def collect(name: str, run_folder: Path, cpu_seconds: float, bundles: Path | None, stored: Path) -> None:
    """Store in the folder `stored` what a fine-tuned run reached, and the files of its export `bundles`.
    name: of DATA; cpu_seconds: user and system time of the whole command, which a busy machine stretches
    least."""
    if name not in DATA:
        raise UsageError(f"--photographs: there is no {name!r}. Known: {', '.join(DATA)}.")
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
    write_atomically(stored / f"photographs-{name}.json", json.dumps(content, indent=1) + "\n")


def text(stored: Path) -> str:
    """-> the section; nothing where no such run was stored."""
    found = {name: stored / f"photographs-{name}.json" for name in DATA}
    runs = [run_text(name, json.loads(file.read_text())) for name, file in found.items() if file.is_file()]
    return fill(PAGE, runs="\n\n".join(runs)).rstrip() if runs else ""


def run_text(name: str, content: dict[str, Any]) -> str:
    summary, data, model = content["summary"], content["data"], content["model"]
    files = ""
    if content["files"]:
        files = fill(FILES, files=file_table(content["files"]), machine=content["machine"])
    counts = {part: sum(numbers) for part, numbers in content["images_per_class"].items()}
    held = [f"{counts[part]:,} for {part}" for part in ("validation", "calibration") if counts.get(part)]
    threads = int(content["toolchain"]["threads"])
    return fill(
        RUN,
        title=DATA[name].title,
        comparison=DATA[name].comparison,
        branches=" + ".join(model["branches"]),
        train=f"{counts['train']:,}",
        held=", ".join(held),
        size=str(data["image_size"]),
        freeze=str(model["freeze"]),
        epochs=str(summary["epochs"]),
        best_epoch=str(summary["best_epoch"]),
        cpu_minutes=f"{content['cpu_seconds'] / 60:.1f}",
        threads=f"{threads} thread{'s' if threads > 1 else ''}",
        precision=content["toolchain"]["precision"],
        accuracy=accuracy_table(summary["accuracy"], summary["test_images"]),
        pairs=pair_table(content["pairs"]),
        recall=recall_text(summary["recall"]["fused"]),
        files=files,
    ).rstrip()


def recall_text(recall: dict[str, float]) -> str:
    """-> a sentence: the recall of each class, or of the worst where they are many."""
    ordered = sorted(recall.items(), key=lambda pair: pair[1])
    few = len(recall) <= LISTED
    listed = ", ".join(f"{name} {share:.0%}" for name, share in (recall.items() if few else ordered[:5]))
    middle = "" if few else f"half of the classes above {ordered[len(ordered) // 2][1]:.0%}, least "
    return f"Recall of the fused classifier: {middle}{listed}."
