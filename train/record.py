"""What a run leaves beside its weights: a line an epoch, TensorBoard events, curves, the progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ffl_deploy.files import write_atomically
from train.trackers import TRACKERS

METRICS = "metrics.jsonl"


class Recorder:
    """Writes the records of `folder`; `first_epoch` drops the lines of epochs
    that a resumed run does again."""

    def __init__(
        self,
        folder: Path,
        first_epoch: int,
        trackers: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """trackers: of TRACKERS, beside TensorBoard; options: what they keep of the run's configuration."""
        self.path = folder / METRICS
        kept = [line for line in read_metrics(folder) if line["epoch"] < first_epoch]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        names = dict.fromkeys(("tensorboard", *trackers))
        self.trackers = [TRACKERS[name](folder, options or {}, first_epoch) for name in names]

    def epoch(self, line: dict[str, Any]) -> None:
        """Append one epoch: {"epoch", "lr", "ramp", "loss", "parts": {..}, "train": {..}, "validation":
        {..}, ...}."""
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        values = {name: line[name] for name in ("loss", "lr", "ramp", "images_per_second")}
        for group in ("parts", "train", "validation", "ema"):
            values |= {f"{group}/{name}": value for name, value in line.get(group, {}).items()}
        for tracker in self.trackers:
            tracker.scalars(values, line["epoch"])

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """-> the lines of metrics.jsonl; a line that a kill cut short is left out."""
    path, lines = folder / METRICS, []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


class Progress:
    """The live view: one line an epoch, which stays, and on a terminal a short bar with ETA and images/s
    below it; nothing when quiet. The bar counts steps, whose number is known from the start."""

    def __init__(self, images_done: int, quiet: bool) -> None:
        self.quiet, self.started_with = quiet, images_done
        self.bar = tqdm(
            bar_format="{desc} {percentage:3.0f}%|{bar:16}| {remaining} left{postfix}",
            disable=quiet or not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.05,
            miniters=1,
        )

    def show(
        self, epoch: int, steps: int, steps_done: int, images_done: int, loss: float, epochs: int
    ) -> None:
        """Move the bar; images_done and steps_done count from the start of the run."""
        if self.bar.disable:
            return
        if self.bar.total is None:
            self.bar.total, self.bar.initial, self.bar.n = steps, steps_done - 1, steps_done - 1
        rate = (images_done - self.started_with) / max(1e-9, self.bar.format_dict["elapsed"])
        self.bar.set_description_str(f"epoch {epoch + 1}/{epochs}", refresh=False)
        self.bar.set_postfix_str(f"{rate:.0f} img/s, loss {loss:.3f}", refresh=False)
        self.bar.update(steps_done - self.bar.n)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """Show a finished epoch (the line that the Recorder got), above the bar."""
        if self.quiet:
            return
        shown = " ".join(f"{name} {100 * value:.1f}" for name, value in line["validation"].items())
        rate = f"{line['images_per_second']:.0f} img/s"
        text = f"epoch {line['epoch'] + 1}/{epochs}  loss {line['loss']:.3f}  val % {shown}  {rate}"
        if self.bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def draw_curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw metrics.jsonl's lines: validation accuracy of every classifier, every loss part,
    and the learning rate, by epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not lines:
        return
    epochs = [line["epoch"] + 1 for line in lines]
    figure, (accuracy, losses, rate) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for name in lines[-1]["validation"]:
        accuracy.plot(epochs, [100 * line["validation"][name] for line in lines], label=name)
    accuracy.set(title="Validation accuracy", xlabel="epoch", ylabel="%")
    # curves that lie on each other stay visible, by their dashes
    for number, name in enumerate(lines[-1]["parts"]):
        values = [line["parts"].get(name, float("nan")) for line in lines]
        losses.plot(epochs, values, label=name, linestyle=("-", (0, (3, 6)), (3, (3, 6)))[number % 3])
    losses.set(title="Training loss by part", xlabel="epoch", ylabel="loss (linear below 0.01)")
    losses.set_yscale("symlog", linthresh=1e-2)
    rate.plot(epochs, [line["lr"] for line in lines], label="learning rate")
    rate.set(title="Schedules", xlabel="epoch", ylabel="learning rate")
    ramp = rate.twinx()
    ramp.plot(epochs, [line["ramp"] for line in lines], color="C1", label="ramp-up of distillation")
    ramp.set(ylabel="ramp-up of distillation", ylim=(-0.05, 1.05))
    ramp.legend(handles=[*rate.lines, *ramp.lines], fontsize=8, loc="lower center")
    for axes in (accuracy, losses):
        axes.legend(fontsize=8)
    for axes in (accuracy, losses, rate):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
