"""report.png: accuracy against latency, one point per artefact."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ffl_deploy.files import write_atomically

if TYPE_CHECKING:
    from ffl_deploy.report import Report


class _Shape(NamedTuple):
    marker: str
    said: str


_SHAPES = {"onnxruntime": _Shape("o", "Circles: ONNX Runtime"), "openvino": _Shape("s", "Squares: OpenVINO")}
_OTHERS = _Shape("^", "Triangles: engines")


def draw_report(report: Report, path: Path) -> None:
    """Draw the measured rows: colour is the target, shape the runtime, area the file's size;
    the front is a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    rows = [row for row in report.rows if row.measured]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    targets = list(dict.fromkeys(row.target for row in rows))
    colours = {target: f"C{index % 10}" for index, target in enumerate(targets)}
    largest = max((row.bytes for row in rows), default=1)
    for row in rows:
        accuracy, low, high = (
            100 * (value or 0) for value in (row.accuracy, row.accuracy_low, row.accuracy_high)
        )
        latency = row.p50_ms or 0.0
        error = [[accuracy - low], [high - accuracy]]
        spread = (
            None
            if row.p50_low_ms is None or row.p50_high_ms is None
            else [[latency - row.p50_low_ms], [row.p50_high_ms - latency]]
        )
        axes.errorbar(latency, accuracy, error, spread, color=colours[row.target], alpha=0.25, zorder=1)
        size = 30 + 170 * row.bytes / largest
        chosen = row.name == report.recommendation.artefact
        axes.scatter(
            latency, accuracy, s=size, marker=_SHAPES.get(row.runtime, _OTHERS).marker,
            color=colours[row.target], edgecolors="black" if chosen else "white",
            linewidths=2 if chosen else 0.5, zorder=3,
        )  # fmt: skip
        if not (row.pareto or chosen):
            continue  # labels of all points would cover each other; the table has them
        label = f"{row.name}{' (ship this)' if chosen else ''}"
        text = axes.annotate(
            label, (latency, accuracy), xytext=(0, 9), textcoords="offset points", fontsize=8, ha="center"
        )
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])  # lines may pass behind it
    front = sorted((row.p50_ms or 0, 100 * (row.accuracy or 0)) for row in rows if row.pareto)
    if front:
        axes.plot(*zip(*front, strict=True), color="gray", linestyle="--", linewidth=1, zorder=2)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    # a range within one decade has labels too
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("latency of one image, p50 (ms)")
    axes.set_ylabel("test accuracy (%), with its 95 % interval")
    axes.grid(alpha=0.2, which="both")
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=target)
        for target, colour in colours.items()
    ]
    handles.append(Line2D([], [], linestyle="--", color="gray", label="Pareto front"))
    axes.legend(handles=handles, loc="lower right", fontsize=8)
    shapes = dict.fromkeys(_SHAPES.get(row.runtime, _OTHERS) for row in rows)
    figure.suptitle(f"Area: file size. {', '.join(shape.said for shape in shapes)}", fontsize=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomically(path, buffer.getvalue())
