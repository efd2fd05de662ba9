"""A Comparison as Markdown, JSON and a plot."""

from __future__ import annotations

from pathlib import Path

from ffl_deploy.files import replace_file, write_atomically, write_json
from train.comparison.results import SEEDS_FOR_A_CLAIM, Against, Comparison, Estimate

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
    c = comparison
    seeds = max(len(method.seeds) for method in c.methods)
    images = ", ".join(f"{count:,} {part}" for part, count in c.images.items())
    tools = ", ".join(f"{name} {value}" for name, value in c.toolchain.items())
    lines = [
        f"# Methods on {c.data}",
        "",
        "```",
        c.command,
        "```",
        "",
        f"{c.classes} classes, {c.size[0]}x{c.size[1]} pixels; {images} images; {c.epochs} epochs; "
        f"{counted(seeds, 'seed')} per method ({tools}).",
        "Test accuracy in %, of the epoch with the best validation accuracy: mean ± standard deviation over "
        "seeds, and the 95 % t-interval of the mean.",
        "",
        f"![accuracy by method]({picture})",
        "",
        *accuracy_table(c),
        "",
        f"## Against {c.reference}",
        "",
        "Strong classifier against strong classifier, seed by seed on the same test images. Points: "
        "difference of accuracy, with its 95 % t-interval over seeds. Images: classified correctly by this "
        f"method only / by {c.reference} only, summed over seeds. p: exact McNemar test of each seed, "
        "two-sided, not corrected for their number.",
        "",
        *difference_table([(m.method, m.against) for m in c.methods]),
        "",
        *alone_section(c),
        "## Cost",
        "",
        "Seconds: training of one run, without validation and test. Parameters: held by a deployed target, "
        "and by all that is trained.",
        "",
        *cost_table(c),
        "",
        "## What this does not show",
        "",
        limits(c, seeds),
    ]
    return "\n".join(lines) + "\n"


def accuracy_table(c: Comparison) -> list[str]:
    rows = []
    for m in c.methods:
        cells = [_percent(m.accuracy[m.strong]), _interval(m.accuracy[m.strong])]
        cells += [
            _percent(m.accuracy[name]) if name in m.accuracy else "" for name in ("ensemble", "mean branch")
        ]
        rows.append([m.method, " + ".join(m.branches), m.strong, *cells])
    return _table(
        ["method", "branches", "strong classifier", "strong", "95 % interval", "ensemble", "mean branch"],
        rows,
    )


def difference_table(compared: list[tuple[str, Against | None]]) -> list[str]:
    rows = []
    for method, against in compared:
        if against is not None:
            gained, lost = (sum(getattr(pair, name) for pair in against.pairs) for name in ("gained", "lost"))
            # 0 is an underflow
            p_values = ", ".join(f"{pair.p:.2g}" if pair.p else "< 1e-300" for pair in against.pairs)
            rows.append(
                [method, points(against.difference), seed_verdict(against), f"{gained} / {lost}", p_values]
            )
    return _table(["method", "points", "over seeds", "images", "McNemar p by seed"], rows)


def points(difference: Estimate) -> str:
    """-> a difference of accuracies in points, with its t-interval."""
    return f"{100 * difference.mean:+.2f} {_interval(difference)}".strip()


def alone_section(c: Comparison) -> list[str]:
    """-> what one branch gained from its training with others; nothing where vanilla was not trained."""
    if not any(m.alone for m in c.methods):
        return []
    return [
        "## One network alone, against vanilla",
        "",
        "The same small network as deployed by itself: `branch0` of each method against the one that was "
        "trained alone, seed by seed; read like the table above.",
        "",
        *difference_table([(m.method, m.alone) for m in c.methods]),
        "",
    ]


def counted(number: int, noun: str) -> str:
    """-> "1 seed", "3 seeds"."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def seed_verdict(against: Against) -> str:
    """-> the sign-flip test over seeds, or why there is none."""
    if against.p_seeds is None:
        return f"no claim below {SEEDS_FOR_A_CLAIM} seeds"
    return f"p = {against.p_seeds:.2g} (exact sign-flip)"


def cost_table(c: Comparison) -> list[str]:
    def seconds(value: Estimate) -> str:
        return f"{value.mean:.1f}" + (f" ± {value.std:.1f}" if value.std is not None else "")

    rows = [
        [
            m.method,
            seconds(m.seconds),
            f"{m.parameters[m.strong]:,} ({m.strong})",
            f"{m.parameters['branch0']:,}",
            f"{m.parameters['training']:,}",
        ]
        for m in c.methods
    ]
    return _table(
        ["method", "seconds", "parameters, strong", "parameters, branch0", "parameters, training"], rows
    )


def limits(c: Comparison, seeds: int) -> str:
    """-> what a reader may not conclude."""
    image = 100 / c.images["test"]
    few = (
        f"{counted(seeds, 'seed')} cannot carry a claim of significance between methods (a sign-flip test "
        f"needs {SEEDS_FOR_A_CLAIM} to reach 5 %), and the intervals are wide for that reason. "
        if seeds < SEEDS_FOR_A_CLAIM
        else "The p values are not corrected for the number of methods; the smallest that a sign-flip test "
        f"{seeds} seeds can give is {2 / 2**seeds:.2g}, and a correction would multiply it by up to "
        f"{len(c.methods) - 1}. "
    )
    return (
        f"One data set, one schedule of {c.epochs} epochs and no tuning: each method runs with its "
        "publication's own weights and temperature under the same optimiser, so this is no ranking of the "
        f"methods at their best. {few}The test set has {c.images['test']:,} images (one is {image:.2f} "
        "points) and is the same for all seeds, so a seed's McNemar test speaks about these two trained "
        "networks on images like these, not about the methods. Methods differ in the number of their "
        "branches and in what their strong classifier costs (see above). Seconds include whatever else the "
        "machine was doing."
    )


def draw(c: Comparison, path: Path) -> None:
    """Write the plot: every seed as a tick, means with their 95 % t-intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.5 * len(c.methods)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for shift, (kind, marker) in enumerate(zip(SHOWN, "oDs", strict=True)):
        for row, m in enumerate(c.methods):
            value = m.accuracy.get(m.strong if kind == "strong" else kind)
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
    axes.set_yticks(range(len(c.methods)), [m.method for m in c.methods])
    axes.invert_yaxis()
    axes.set(
        xlabel="test accuracy, % (mean, 95 % t-interval; ticks: seeds)", title=f"{c.data}, {c.epochs} epochs"
    )
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=90)


def _percent(value: Estimate) -> str:
    return f"{100 * value.mean:.2f}" + (f" ± {100 * value.std:.2f}" if value.std is not None else "")


def _interval(value: Estimate) -> str:
    return (
        "" if value.low is None or value.high is None else f"[{100 * value.low:.2f}, {100 * value.high:.2f}]"
    )


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
