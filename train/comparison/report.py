"""A Comparison as Markdown (report.md and the files beside it hold its sentences), JSON and a plot."""

from __future__ import annotations

from pathlib import Path

from ffl_deploy.files import replace_file, write_atomically, write_json
from ffl_deploy.markdown import fill, table
from train.comparison.results import SEEDS_FOR_A_CLAIM, Against, Comparison, Estimate

PAGE, ALONE, LIMITS = (Path(__file__).with_name(f"{name}.md") for name in ("report", "alone", "limits"))
SHOWN = ("strong", "ensemble", "mean branch")


def write_report(comparison: Comparison, folder: Path) -> str:
    """Write NAME.md, NAME.json and NAME.png into `folder`, NAME being its own name; -> the Markdown."""
    name = folder.resolve().name
    text = markdown(comparison, f"{name}.png")
    write_json(folder / f"{name}.json", comparison)
    draw(comparison, folder / f"{name}.png")
    write_atomically(folder / f"{name}.md", text)
    return text


def markdown(comparison: Comparison, picture: str) -> str:
    """-> the whole report."""
    seeds = max(len(method.seeds) for method in comparison.methods)
    width, height = comparison.size
    return fill(
        PAGE,
        data=comparison.data,
        command=comparison.command,
        classes=str(comparison.classes),
        size=f"{width}x{height}",
        images=", ".join(f"{count:,} {split}" for split, count in comparison.images.items()),
        epochs=str(comparison.epochs),
        seeds=counted(seeds, "seed"),
        toolchain=", ".join(f"{name} {version}" for name, version in comparison.toolchain.items()),
        picture=picture,
        accuracy=accuracy_table(comparison),
        reference=comparison.reference,
        differences=difference_table([(method.method, method.against) for method in comparison.methods]),
        alone=alone_section(comparison),
        cost=cost_table(comparison),
        limits=limits(comparison, seeds),
    )


def accuracy_table(comparison: Comparison) -> str:
    rows = []
    for method in comparison.methods:
        strong = method.accuracy[method.strong]
        cells = [_deviation(strong), _interval(strong)]
        cells += [
            _deviation(method.accuracy[name]) if name in method.accuracy else ""
            for name in ("ensemble", "mean branch")
        ]
        rows.append([method.method, " + ".join(method.branches), method.strong, *cells])
    return table(
        ["method", "branches", "strong classifier", "strong", "95 % interval", "ensemble", "mean branch"],
        rows,
    )


def difference_table(compared: list[tuple[str, Against | None]]) -> str:
    rows = []
    for method, against in compared:
        if against is not None:
            gained, lost = (sum(getattr(pair, name) for pair in against.pairs) for name in ("gained", "lost"))
            # a p of 0 is an underflow
            p_values = ", ".join(f"{pair.p:.2g}" if pair.p else "< 1e-300" for pair in against.pairs)
            rows.append(
                [method, points(against.difference), seed_verdict(against), f"{gained} / {lost}", p_values]
            )
    return table(["method", "points", "over seeds", "images", "McNemar p by seed"], rows)


def points(difference: Estimate) -> str:
    """-> a difference of accuracies in points, with its t-interval."""
    return f"{100 * difference.mean:+.2f} {_interval(difference)}".strip()


def alone_section(comparison: Comparison) -> str:
    """-> what one branch gained from its training with others; nothing where vanilla was not trained."""
    if not any(method.alone for method in comparison.methods):
        return ""
    differences = difference_table([(method.method, method.alone) for method in comparison.methods])
    return fill(ALONE, differences=differences)


def counted(number: int, noun: str) -> str:
    """-> "1 seed", "3 seeds"."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def seed_verdict(against: Against) -> str:
    """-> the sign-flip test over seeds, or why there is none."""
    if against.p_seeds is None:
        return f"no claim below {SEEDS_FOR_A_CLAIM} seeds"
    return f"p = {against.p_seeds:.2g} (exact sign-flip)"


def cost_table(comparison: Comparison) -> str:
    rows = []
    for method in comparison.methods:
        spread = "" if method.seconds.std is None else f" ± {method.seconds.std:.1f}"
        rows.append(
            [
                method.method,
                f"{method.seconds.mean:.1f}{spread}",
                f"{method.parameters[method.strong]:,} ({method.strong})",
                f"{method.parameters['branch0']:,}",
                f"{method.parameters['training']:,}",
            ]
        )
    return table(
        ["method", "seconds", "parameters, strong", "parameters, branch0", "parameters, training"], rows
    )


def limits(comparison: Comparison, seeds: int) -> str:
    """-> what a reader may not conclude."""
    if seeds < SEEDS_FOR_A_CLAIM:
        significance = (
            f"{counted(seeds, 'seed')} cannot carry a claim of significance between methods (a sign-flip "
            f"test needs {SEEDS_FOR_A_CLAIM} to reach 5 %), and the intervals are wide for that reason."
        )
    else:
        significance = (
            "The p values are not corrected for the number of methods; the smallest that a sign-flip test of "
            f"{seeds} seeds can give is {2 / 2**seeds:.2g}, and a correction would multiply it by up to "
            f"{len(comparison.methods) - 1}."
        )
    images = comparison.images["test"]
    return fill(
        LIMITS,
        epochs=str(comparison.epochs),
        significance=significance,
        test_images=f"{images:,}",
        image_points=f"{100 / images:.2f}",
    ).rstrip()


def draw(comparison: Comparison, path: Path) -> None:
    """Write the plot: every seed as a tick, means with their 95 % t-intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.5 * len(comparison.methods)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for shift, (kind, marker) in enumerate(zip(SHOWN, "oDs", strict=True)):
        for row, method in enumerate(comparison.methods):
            value = method.accuracy.get(method.strong if kind == "strong" else kind)
            if value is None:
                continue
            height, colour = row + 0.25 * (shift - 1), f"C{shift}"
            axes.plot(
                [100 * v for v in value.values],
                [height] * len(value.values),
                "|",
                color="black",
                markersize=7,
                zorder=3,
            )
            spread = None
            if value.low is not None and value.high is not None:
                spread = [[100 * (value.mean - value.low)], [100 * (value.high - value.mean)]]
            label = f"{kind} classifier" if kind == "strong" else kind
            axes.errorbar(
                100 * value.mean, height, xerr=spread, fmt=marker, color=colour, markersize=5, capsize=2,
                label=label if row == 0 else None,
            )  # fmt: skip
    axes.set_yticks(range(len(comparison.methods)), [method.method for method in comparison.methods])
    axes.invert_yaxis()
    axes.set(
        xlabel="test accuracy, % (mean, 95 % t-interval; ticks: seeds)",
        title=f"{comparison.data}, {comparison.epochs} epochs",
    )
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=90)


def _deviation(value: Estimate) -> str:
    """-> mean and standard deviation, in percent."""
    return f"{100 * value.mean:.2f}" + (f" ± {100 * value.std:.2f}" if value.std is not None else "")


def _interval(value: Estimate) -> str:
    """-> the t-interval in percent; nothing of one seed."""
    if value.low is None or value.high is None:
        return ""
    return f"[{100 * value.low:.2f}, {100 * value.high:.2f}]"
