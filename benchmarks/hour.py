"""What an hour of this machine buys: our `fast` recipe against the official recipe, compressed to as many
epochs as the official code gets through in an hour.

    python -m train.run --data CIFAR100 --recipe cifar100-resnet32-fast --out runs/cifar100
    python -m train.run --data CIFAR100 --recipe cifar100-resnet32-paper --epochs 14 --validation 0.02 \\
        --out runs/official-hour
    python -m benchmarks.hour --fast runs/cifar100 --official runs/official-hour

The official recipe is trained by this project, which learns the same (learn_vs_official) in less time; its
epochs are put on the clock of the official code, measured side by side (--speed). Writes
docs/performance/hour.json and hour.png, prints the table. Without --fast and --official it prints and draws
what is stored.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ffl_deploy import markdown
from ffl_deploy.arrays import read_arrays
from ffl_deploy.command import run_command
from ffl_deploy.errors import UsageError
from ffl_deploy.run_directory import PREDICTIONS, SUMMARY, load_run
from ffl_deploy.statistics import wilson_interval
from train.record import read_metrics

STORED = Path("docs/performance")


def official_rate(speed: Path) -> float:
    """-> images/s of the official code, as train_vs_official measured it: the median of its blocks."""
    measured = json.loads(speed.read_text())
    return measured["batch"] / float(
        np.median([block["seconds"] for block in measured["blocks"]["official"]])
    )


def curve(folder: Path, rate: float | None = None) -> dict[str, Any]:
    """A finished run -> its accuracies against time. rate: images/s that count, None for the run's own."""
    run, lines = load_run(folder), read_metrics(folder)
    if not (folder / SUMMARY).is_file():
        raise UsageError(f"{folder} is not finished; go on with: python -m train.run --resume {folder}")
    images = sum(run.config.split["images_per_class"]["train"])
    seconds = np.cumsum([images / (rate or line["images_per_second"]) for line in lines])
    arrays = read_arrays(folder / PREDICTIONS, ("labels",))
    return {
        "recipe": run.config.options["recipe"],
        "precision": run.config.toolchain["precision"],
        "images_per_second": round(float(images * len(lines) / seconds[-1]), 1),
        "minutes": [round(float(value) / 60, 2) for value in seconds],
        "lr": [line["lr"] for line in lines],
        "validation": [line["validation"] for line in lines],
        "test": {name: int((arrays[name] == arrays["labels"]).sum()) for name in arrays if name != "labels"},
        "test_images": len(arrays["labels"]),
    }


def table(curves: dict[str, dict[str, Any]]) -> str:
    """-> test accuracies with intervals, and the validation accuracy of the fused classifier on the way."""
    reached_in_test = []
    for name, one in curves.items():
        share = {key: 100 * hits / one["test_images"] for key, hits in one["test"].items()}
        interval = wilson_interval(one["test"]["fused"], one["test_images"])
        branches = " and ".join(f"{value:.2f}" for key, value in share.items() if key.startswith("branch"))
        reached_in_test.append(
            [
                name,
                f"{len(one['minutes'])}",
                f"{one['minutes'][-1]:.0f}",
                f"**{share['fused']:.2f}** ({markdown.within(interval.low, interval.high)})",
                f"{share['ensemble']:.2f}",
                branches,
            ]
        )
    test = markdown.table(
        ["", "epochs", "minutes", "fused % (95 % interval)", "ensemble %", "branches %"], reached_in_test
    )

    marks = range(10, 61, 10)
    on_the_way = []
    for name, one in curves.items():
        values = [reached(one, minute) for minute in marks]
        on_the_way.append([name, *("" if value is None else f"{100 * value:.1f}" for value in values)])
    validation = markdown.table(
        ["fused, validation %, after", *(f"{minute} min" for minute in marks)], on_the_way
    )
    return f"{test}\n\n{validation}"


def reached(one: dict[str, Any], minute: float) -> float | None:
    """-> validation accuracy of the fused classifier after the last epoch that was complete at `minute`."""
    done = [line["fused"] for at, line in zip(one["minutes"], one["validation"], strict=True) if at <= minute]
    return done[-1] if done else None


def draw(curves: dict[str, dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, one) in enumerate(curves.items()):
        values = {
            key: [100 * line[key] for line in one["validation"]] for key in ("fused", "ensemble", "branch0")
        }
        for (key, series), style in zip(values.items(), ("-", "--", ":"), strict=True):
            axes.plot(one["minutes"], series, style, color=f"C{number}", label=f"{name}, {key}")
    axes.set(xlabel="minutes of two cores", ylabel="validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_figure(path, dpi=90)


def main(argv: list[str]) -> int:
    """-> exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", type=Path, metavar="RUN", help="a finished run of the fast recipe")
    parser.add_argument("--official", type=Path, metavar="RUN", help="a finished run of the official recipe")
    parser.add_argument("--speed", type=Path, metavar="JSON", default=STORED / "train-vs-official.json")
    arguments = parser.parse_args(argv)
    if (arguments.fast is None) != (arguments.official is None):
        raise UsageError("--fast and --official belong together; give both.")
    stored = STORED / "hour.json"
    if arguments.fast:
        curves = {
            "fast recipe, this trainer": curve(arguments.fast),
            "official recipe, official code's speed": curve(
                arguments.official, official_rate(arguments.speed)
            ),
        }
        stored.write_text(json.dumps(curves, indent=1) + "\n")
    curves = json.loads(stored.read_text())
    draw(curves, STORED / "hour.png")
    print(table(curves))
    ours, official = (100 * one["test"]["fused"] / one["test_images"] for one in curves.values())
    print(f"\nfused: {ours - official:+.2f} points")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
