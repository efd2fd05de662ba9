"""docs/results.md from stored JSON: what the CIFAR-100 model of examples/cifar100 reaches,
and how it was trained.

The commands are on the page itself, below each table. With --run, --report and --reliability what the page
needs of the model is stored in docs/results/, once; what train.compare wrote is copied to docs/. Without
flags the page and its figures are made again, which needs neither the runs nor the data.
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

from benchmarks.page.comparison_text import comparison_text
from export.publish.plot import draw_report
from export.publish.report import markdown
from ffl_deploy.arrays import read_arrays
from ffl_deploy.bundle import load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import load_data
from ffl_deploy.errors import UsageError
from ffl_deploy.images import load
from ffl_deploy.report import Report
from ffl_deploy.run_directory import PREDICTIONS, SUMMARY, load_run
from ffl_deploy.runtime.replay import run_in_batches
from ffl_deploy.statistics import paired_difference, wilson_interval
from train.record import draw_curves, read_metrics

DOCS, EXAMPLES = Path("docs"), Path("examples/cifar100")
STORED = DOCS / "results"
TRAINING_COMMAND = (
    "    python -m train.run --data cifar100 --recipe cifar100-resnet32-fast --precision bf16 --out "
    "runs/cifar100"
)
ALONE_COMMANDS = """\
    python -m train.run --data cifar100 --recipe cifar100-resnet32-fast --precision bf16 --method vanilla \\
        --out runs/vanilla-cifar100
    python -m benchmarks.page.results --alone runs/vanilla-cifar100"""
EXPORT_COMMAND = (
    "    ffl-export runs/cifar100 --target all --precision int8 --runtime openvino --out bundles/cifar100"
)
CALIBRATION_COMMANDS = """\
    ffl-predict bundles/cifar100/fused CIFAR100/test --out fused.jsonl  # CIFAR100/test/CLASS/*: its images
    ffl-predict bundles/cifar100/branch0 CIFAR100/test --out branch0.jsonl"""
STORING_COMMANDS = """\
    python -m benchmarks.page.results --run runs/cifar100 --report bundles/cifar100/report.json \\
        --reliability fused.jsonl.report.json branch0.jsonl.report.json
    cp runs/compare-cifar100/compare-cifar100.{json,md,png} docs/
    cp runs/ablations-cifar100/ablations-cifar100.json runs/claims-cifar100/claims-cifar100.json docs/
    python -m benchmarks.page.results"""
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
    """Class activation maps of the committed bundles on the example images; -> image -> bundle -> (label,
    confidence)."""
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
    calibrations = draw_reliability(STORED / "reliability.png")
    attention = draw_attention(STORED / "cam.png")
    return (
        "\n\n".join(
            [
                "# Results on CIFAR-100",
                "Generated by `python -m benchmarks.page.results` from the JSON in `docs/results/`; the "
                "model is the one in [`examples/cifar100`](../examples/cifar100/README.md).",
                "## The model",
                model_text(training),
                "![validation accuracy, losses and schedules](results/curves.png)",
                "## What to deploy",
                deployment_text(report),
                "![accuracy against latency](results/pareto.png)",
                "## Calibration",
                "The temperature is fitted on the validation split and part of the graph; measured here on "
                "the test images, as files, through `ffl-predict` and the fp32 variant:",
                CALIBRATION_COMMANDS,
                "\n".join(
                    f"- `{one['name']}`: accuracy {one['accuracy']:.2%}, mean confidence "
                    f"{one['mean_confidence']:.2%}, "
                    f"expected calibration error {one['expected_calibration_error']:.4f}"
                    for one in calibrations
                ),
                "![reliability diagrams](results/reliability.png)",
                "Bars, with their 95 % interval (Wilson): the accuracy of the images within a range of "
                "confidence. The lowest ranges hold few images, which their intervals show.",
                "## Where it looks",
                "Class activation maps of the predicted class on the example images, which the network has "
                "never seen (cup and rocket are photographs, the others drawings):",
                "![class activation maps of fused and branch0](results/cam.png)",
                attention_table(attention),
                comparison_text(DOCS),
                "## This page",
                "What it needs was stored, once, from the run, its export and its labelled predictions, and "
                "from the comparisons; the last line writes it again:",
                STORING_COMMANDS,
            ]
        )
        + "\n"
    )


def model_text(training: dict[str, Any]) -> str:
    summary, options = training["summary"], training["options"]
    seen, per_class, classes = options["data"], training["images_per_class"], len(summary["classes"])
    branches, count, minutes = (
        " + ".join(options["model"]["branches"]),
        summary["test_images"],
        summary["seconds"] / 60,
    )
    lines = [
        f"FFL with {branches}, recipe `{training['recipe']}`: {summary['epochs']} epochs in {minutes:.0f} "
        f"minutes of training ({training['toolchain']['threads']} threads, "
        f"{training['toolchain']['precision']}; processor and circumstances: "
        f"[performance.md](performance.md)). Each class has {per_class['train'][0]} training and "
        f"{per_class['validation'][0]} validation images; the first {seen['small_share']:.0%} of the epochs "
        f"saw {seen['small_size']}x{seen['small_size']} pixels, the rest 32x32, which is the step in the "
        f"curves. The weights are those of epoch {summary['best_epoch']}, the best on the validation split, "
        f"whose {classes * per_class['validation'][0]:,} images make it uncertain by 3 points; training "
        "reads the test set once, at its end.",
        "",
        TRAINING_COMMAND,
        "",
        "`--data cifar100` downloads the set; a folder of its images, `CIFAR100/train/CLASS/*` and "
        "`CIFAR100/test/CLASS/*`, does as well. Where the processor's bf16 is slow, leave `--precision` out "
        "and take `--epochs 26` for the same hour.",
        "",
        f"| classifier | test accuracy ({count:,} images) | 95 % interval (Wilson) |",
        "|---|---|---|",
    ]
    for name, accuracy in summary["accuracy"].items():
        interval = wilson_interval(round(accuracy * count), count)
        lines.append(f"| {name} | {accuracy:.2%} | {interval.low:.2%} to {interval.high:.2%} |")
    lines += [
        "",
        "On the same images, pair by pair (exact McNemar, two-sided, not corrected for their number):",
        "",
    ]
    return "\n".join([*lines, *pair_table(training["pairs"]), *alone_lines(count)])


def pair_table(pairs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| | minus | points | 95 % interval (Tango) | right: only first / only second | p |",
        "|---|---|---|---|---|---|",
    ]
    for pair in pairs:
        low, high = (100 * pair["interval"][side] for side in ("low", "high"))
        lines.append(
            f"| {pair['other']} | {pair['one']} | {100 * pair['delta']:+.2f} | {low:+.2f} to {high:+.2f} "
            f"| {pair['gained']} / {pair['lost']} | {pair['p_different']:.2g} |"
        )
    return lines


def alone_lines(count: int) -> list[str]:
    """-> the model against the same network trained by itself for as many epochs;
    nothing where that was not done."""
    if not (STORED / "alone.json").is_file():
        return []
    alone = json.loads((STORED / "alone.json").read_text())
    interval = wilson_interval(round(alone["accuracy"] * count), count)
    return [
        "",
        f"The same network trained alone ({' + '.join(alone['branches'])}, `--method vanilla`, the same "
        f"recipe, seed and {alone['epochs']} epochs) reaches {alone['accuracy']:.2%} ({interval.low:.2%} to "
        f"{interval.high:.2%}). Against it, on the same images:",
        "",
        *pair_table(alone["pairs"]),
        "",
        ALONE_COMMANDS,
        "",
        "One run on each side: the test says that these two networks differ, or not, and nothing about other "
        "seeds. Epochs are equal, cost is not: the fused classifier has 1.8 times the parameters of the "
        "network alone (see the table below) and its training computes two branches. An ensemble of two "
        "networks trained apart was not trained for as long.",
    ]


def deployment_text(report: Report) -> str:
    body = markdown(report).split("\n", 2)[2].split("![accuracy")[0].strip()
    note = (
        "The committed bundles are an export of the same run with `--cam`; their int8 files were quantised "
        "anew and differ from these by some images in 10,000: their cards have their own numbers, and their "
        "latencies are of another hour (there the fp32 branch even reads slower than the fused model, which "
        "the multiply-adds say it is not)."
    )
    return f"{body}\n\n{EXPORT_COMMAND}\n\n{note}"


def attention_table(attention: list[tuple[str, dict[str, tuple[str, float]]]]) -> str:
    names = list(attention[0][1])
    lines = [f"| image | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for image, answers in attention:
        lines.append(
            f"| {image} | "
            f"{' | '.join(f'{label} {confidence:.0%}' for label, confidence in answers.values())} |"
        )
    return "\n".join(lines)


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
    arguments = parser.parse_args(argv)
    if (arguments.run is None) != (arguments.report is None):
        raise UsageError("--run and --report belong together; give both.")
    if arguments.run:
        collect(arguments.run, arguments.report, arguments.reliability)
    if arguments.alone:
        collect_alone(arguments.alone)
    (DOCS / "results.md").write_text(page())
    print(DOCS / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
