"""docs/results.md from stored JSON: what the CIFAR-100 model of examples/cifar100 reaches,
and how it was trained.

results.md, alone.md and the files of comparison_text.py, fine_tuning.py, photographs.py and teacher.py hold
the page's sentences and commands, this file the values. With --run, --report, --reliability, --fine-tuned,
--photographs and --taught what the page needs of the models is stored in docs/results/, once; what
train.compare wrote is copied to docs/. Without flags the page and its figures are made again, which needs
neither the runs nor the data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.page import fine_tuning, photographs, teacher
from benchmarks.page.comparison_text import comparison_text
from benchmarks.page.pairs import accuracy_table, pair_table, wilson_of
from export.publish.plot import draw_report
from export.publish.report import body
from ffl_deploy.arrays import read_arrays
from ffl_deploy.bundle import load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import load_data
from ffl_deploy.errors import UsageError
from ffl_deploy.images import load
from ffl_deploy.markdown import fill, table
from ffl_deploy.report import Report
from ffl_deploy.run_directory import PREDICTIONS, SUMMARY, load_run
from ffl_deploy.runtime.replay import run_in_batches
from ffl_deploy.statistics import paired_difference, wilson_interval
from train.record import draw_curves, read_metrics

DOCS, EXAMPLES = Path("docs"), Path("examples/cifar100")
STORED = DOCS / "results"
PAGE, ALONE = (Path(__file__).with_name(f"{name}.md") for name in ("results", "alone"))
KEPT_OPTIONS = ("data", "model", "optimisation")


def collect(run_folder: Path, report: Path, reliability: list[Path]) -> None:
    """Store what the page needs of a finished run, its export report and labelled predictions."""
    run = load_run(run_folder)
    arrays = read_arrays(run_folder / PREDICTIONS, ("labels",))
    right = {name: arrays[name] == arrays["labels"] for name in arrays if name != "labels"}
    pairs = [
        {"one": one, "other": other, **msgspec.to_builtins(paired_difference(right[one], right[other]))}
        for one, other in itertools.combinations(right, 2)
    ]
    options = {group: values for group, values in run.config.options.items() if group in KEPT_OPTIONS}
    # the folder's place is this machine's affair
    options["data"] = {**options["data"], "source": run.config.data_name}
    training = {
        "recipe": run.config.options["recipe"],
        "options": options,
        "images_per_class": {
            part: sorted(set(counts)) for part, counts in run.config.split["images_per_class"].items()
        },
        "summary": json.loads((run_folder / SUMMARY).read_text()),
        "metrics": read_metrics(run_folder),
        "pairs": pairs,
        "toolchain": run.config.toolchain,
    }
    STORED.mkdir(exist_ok=True)
    (STORED / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    shutil.copy(report, STORED / "report.json")
    for path in reliability:
        content = json.loads(path.read_text())
        content.pop("confusion")
        (STORED / f"reliability-{path.name.split('.')[0]}.json").write_text(
            json.dumps(content, indent=1) + "\n"
        )


def collect_alone(run_folder: Path) -> None:
    """Store how the committed bundles do on the test images against a network that was trained alone,
    image by image."""
    run = load_run(run_folder)
    test = load_data(run.data).test
    arrays = read_arrays(run_folder / PREDICTIONS, ("labels",))
    alone = arrays["branch0"] == arrays["labels"]
    pairs = []
    for name in ("fused", "branch0"):
        outputs = run_in_batches(load_bundle(EXAMPLES / name).session().run, test.read, len(test), 64)
        right = outputs.logits.argmax(axis=1) == test.labels
        pairs.append({"one": "alone", "other": name, **msgspec.to_builtins(paired_difference(alone, right))})
    summary = json.loads((run_folder / SUMMARY).read_text())
    content = {
        "branches": list(run.model.network["branches"]),
        "epochs": summary["epochs"],
        "accuracy": summary["accuracy"]["branch0"],
        "pairs": pairs,
        "toolchain": run.config.toolchain,
    }
    (STORED / "alone.json").write_text(json.dumps(content, indent=1) + "\n")


def draw_reliability(path: Path) -> list[dict[str, Any]]:
    """One diagram per stored labelled run; -> these runs' reports."""
    files = sorted(STORED.glob("reliability-*.json"), reverse=True)
    reports = [
        json.loads(file.read_text()) | {"name": file.stem.removeprefix("reliability-")} for file in files
    ]
    figure = Figure(figsize=(5 * max(1, len(reports)), 4.6), layout="constrained")
    for position, report in enumerate(reports, start=1):
        axes = figure.add_subplot(1, len(reports), position)
        bins = [one for one in report["calibration"] if one["rows"]]
        axes.plot([0, 1], [0, 1], ":", color="gray")
        axes.bar(
            [one["from"] for one in bins],
            [one["accuracy"] for one in bins],
            1 / 15,
            align="edge",
            alpha=0.5,
            edgecolor="C0",
        )
        intervals = [wilson_interval(round(one["accuracy"] * one["rows"]), one["rows"]) for one in bins]
        spread = np.array(
            [
                (one["accuracy"] - i.low, i.high - one["accuracy"])
                for one, i in zip(bins, intervals, strict=True)
            ]
        )
        axes.errorbar(
            [one["confidence"] for one in bins],
            [one["accuracy"] for one in bins],
            spread.clip(0).T,
            fmt="o",
            color="C1",
            capsize=2,
        )
        title = f"{report['name']}: expected calibration error {report['expected_calibration_error']:.4f}"
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=title)
    FigureCanvasAgg(figure).print_figure(path, dpi=100)
    return reports


def draw_attention(path: Path) -> list[tuple[str, dict[str, tuple[str, float]]]]:
    """Class activation maps of the committed bundles on the example images; -> image -> bundle
    -> (label, confidence)."""
    bundles = [load_bundle(EXAMPLES / name) for name in ("fused", "branch0")]
    sessions = [bundle.session() for bundle in bundles]
    images = sorted((EXAMPLES / "images").glob("*.jpg"))
    figure = Figure(figsize=(2 * len(images), 2.25 * (1 + len(bundles))), layout="constrained")
    found: list[tuple[str, dict[str, tuple[str, float]]]] = []
    for column, image in enumerate(images):
        axes = figure.add_subplot(1 + len(bundles), len(images), 1 + column)
        axes.imshow(Image.open(image).convert("RGB").resize((256, 256)))
        axes.set_title(image.name, fontsize=9)
        axes.axis("off")
        answers = {}
        for row, (bundle, session) in enumerate(zip(bundles, sessions, strict=True), start=1):
            pixels = load(image, bundle.preprocessing)
            outputs = session.run(pixels[None])
            best = bundle.prediction(outputs.logits[0], outputs.probabilities[0])
            answers[bundle.manifest.target] = (best.label, best.confidence)
            axes = figure.add_subplot(1 + len(bundles), len(images), 1 + column + row * len(images))
            axes.imshow(pixels, extent=(0, 1, 0, 1))
            axes.imshow(
                np.maximum(outputs.cam[0], 0),
                extent=(0, 1, 0, 1),
                cmap="jet",
                alpha=0.45,
                interpolation="bicubic",
            )
            axes.set_title(f"{bundle.manifest.target}: {best.label} {best.confidence:.0%}", fontsize=9)
            axes.axis("off")
        found.append((image.name, answers))
    FigureCanvasAgg(figure).print_figure(path, dpi=90)
    return found


def page() -> str:
    """-> docs/results.md."""
    if not (STORED / "training.json").is_file():
        raise UsageError(
            f"{STORED} holds no results; store them first with --run, --report and --reliability."
        )
    training = json.loads((STORED / "training.json").read_text())
    report = msgspec.json.decode((STORED / "report.json").read_bytes(), type=Report)
    draw_curves(training["metrics"], STORED / "curves.png")
    draw_report(report, STORED / "pareto.png")
    return fill(
        PAGE,
        **model_values(training),
        alone=alone_text(training["summary"]["test_images"]),
        fine_tuning=fine_tuning.text(STORED),
        photographs=photographs.text(STORED),
        teacher=teacher.text(STORED),
        report=body(report).rstrip(),
        calibrations=calibration_list(draw_reliability(STORED / "reliability.png")),
        attention=attention_table(draw_attention(STORED / "cam.png")),
        methods=comparison_text(DOCS),
    )


def model_values(training: dict[str, Any]) -> dict[str, str]:
    """-> what the page says of the model itself."""
    summary, options, toolchain = training["summary"], training["options"], training["toolchain"]
    per_class = {split: counts[0] for split, counts in training["images_per_class"].items()}
    return {
        "branches": " + ".join(options["model"]["branches"]),
        "recipe": training["recipe"],
        "epochs": str(summary["epochs"]),
        "minutes": f"{summary['seconds'] / 60:.0f}",
        "threads": str(toolchain["threads"]),
        "precision": toolchain["precision"],
        "train_per_class": str(per_class["train"]),
        "validation_per_class": str(per_class["validation"]),
        "small_share": f"{options['data']['small_share']:.0%}",
        "small_size": str(options["data"]["small_size"]),
        "best_epoch": str(summary["best_epoch"]),
        "validation_images": f"{len(summary['classes']) * per_class['validation']:,}",
        "accuracy": accuracy_table(summary["accuracy"], summary["test_images"]),
        "pairs": pair_table(training["pairs"]),
    }


def alone_text(test_images: int) -> str:
    """-> the model against the same network trained by itself for as many epochs; nothing where
    that was not done."""
    if not (STORED / "alone.json").is_file():
        return ""
    alone = json.loads((STORED / "alone.json").read_text())
    low, high = wilson_of(alone["accuracy"], test_images)
    return fill(
        ALONE,
        branches=" + ".join(alone["branches"]),
        epochs=str(alone["epochs"]),
        accuracy=f"{alone['accuracy']:.2%}",
        low=low,
        high=high,
        pairs=pair_table(alone["pairs"]),
    ).rstrip()


def calibration_list(reports: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"- `{report['name']}`: accuracy {report['accuracy']:.2%}, mean confidence "
        f"{report['mean_confidence']:.2%}, expected calibration error "
        f"{report['expected_calibration_error']:.4f}"
        for report in reports
    )


def attention_table(attention: list[tuple[str, dict[str, tuple[str, float]]]]) -> str:
    """-> what each bundle sees in each example image."""
    bundles = list(attention[0][1])
    rows = [
        [image, *(f"{label} {confidence:.0%}" for label, confidence in answers.values())]
        for image, answers in attention
    ]
    return table(["image", *bundles], rows)


def main(argv: list[str]) -> int:
    """-> exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, metavar="RUN", help="store this finished run")
    parser.add_argument("--report", type=Path, metavar="JSON", help="report.json of its export")
    parser.add_argument(
        "--alone", type=Path, metavar="RUN", help="store this finished run of --method vanilla"
    )
    parser.add_argument(
        "--reliability",
        type=Path,
        nargs="*",
        default=[],
        metavar="JSON",
        help="TARGET.report.json of ffl-predict",
    )
    parser.add_argument(
        "--fine-tuned",
        type=Path,
        nargs=3,
        metavar=("RUN", "BEFORE", "BUNDLES"),
        help="store this finished run of --quantize-aware, the run that it goes on from, and its export",
    )
    parser.add_argument(
        "--photographs",
        nargs="+",
        metavar=("DATA RUN CPU_SECONDS", "BUNDLES"),
        help="store this finished run that started from weights: flowers or cifar100, the run, its CPU time, "
        "and its export if it has one",
    )
    parser.add_argument(
        "--taught",
        type=Path,
        nargs="+",
        metavar=("TEACHER ALONE TAUGHT", "ALONE TAUGHT"),
        help="store these finished runs: a teacher, and students of one seed each, alone and under it",
    )
    arguments = parser.parse_args(argv)
    if (arguments.run is None) != (arguments.report is None):
        raise UsageError("--run and --report belong together; give both.")
    if arguments.run:
        collect(arguments.run, arguments.report, arguments.reliability)
    if arguments.alone:
        collect_alone(arguments.alone)
    if arguments.fine_tuned:
        fine_tuning.collect(*arguments.fine_tuned, STORED)
    if arguments.photographs:
        name, run, seconds, *bundles = arguments.photographs
        exported = Path(bundles[0]) if bundles else None
        photographs.collect(name, Path(run), float(seconds), exported, STORED)
    if arguments.taught:
        teacher.collect(arguments.taught[0], arguments.taught[1:], STORED)
    (DOCS / "results.md").write_text(page())
    print(DOCS / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
