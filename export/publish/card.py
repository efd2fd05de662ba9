"""The model card: a bundle's README.md, written from its manifest and nothing else.

card.md holds its sentences; here are the values, and the sentences that depend on them.
"""

from __future__ import annotations

from pathlib import Path

from ffl_deploy.manifest import Manifest, Variant
from ffl_deploy.markdown import fill, megabytes, percent, table, within
from ffl_deploy.verified_on import processor_table

TEMPLATE = Path(__file__).with_name("card.md")
SHOWN_CLASSES = 10
COLUMNS = (
    "variant",
    "file",
    "MB",
    "precision stored / computed",
    "accuracy (95 % interval)",
    "agrees with PyTorch",
    "accuracy gate",
    "ms per image p50 / p95",
    "images/s (batch)",
)

_STRONG = {
    "fused": "the fused classifier of Feature Fusion Learning: every branch's features, fused",
    "ensemble": "the ensemble: the mean of the branches' logits",
    "gated": "the gated ensemble of ONE: a learned, input-dependent mean of the branches' logits",
}


def model_card(manifest: Manifest) -> str:
    """-> Markdown: what it is, how good, how to use it, where it comes from, what it cannot do."""
    source, shape = manifest.source, manifest.input.preprocessing
    shown, more = manifest.classes[:SHOWN_CLASSES], manifest.classes[SHOWN_CLASSES:]
    batch = manifest.input.batch
    return fill(
        TEMPLATE,
        target=manifest.target,
        branches=" + ".join(source.branches),
        data=source.data,
        what=_what(manifest),
        method=source.method,
        layout=manifest.input.layout,
        height=str(shape.height),
        width=str(shape.width),
        resize=shape.resize,
        static_batch=f" Exactly {batch} at a time; ffl-predict fills up the last batch." if batch else "",
        outputs=", ".join(f"`{output.name}` {output.shape}" for output in manifest.outputs),
        classes=", ".join(shown) + (f" and {len(more)} more" if more else ""),
        class_count=str(len(manifest.classes)),
        parameters=f"{source.parameters:,}",
        variants=table(COLUMNS, map(_row, manifest.variants)),
        measured_on=_measured_on(manifest),
        processors=_processors(manifest),
        calibration=_calibration(manifest),
        sets=_sets(manifest),
        cascade=_cascade(manifest),
        familiarity=_familiarity(manifest),
        run=source.run,
        checkpoint=source.checkpoint,
        epoch=str(source.epoch),
        checkpoint_sha256=source.checkpoint_sha256,
        golden_count=str(manifest.golden.count),
        golden_origin=manifest.golden.origin,
        toolchain=", ".join(f"{name} {version}" for name, version in manifest.toolchain.items()),
    )


def _what(manifest: Manifest) -> str:
    if manifest.variants[0].exits:
        return "a cascade: {} first, {} where that is unsure".format(*manifest.variants[0].exits)
    return _STRONG.get(manifest.target, "one sub-network, deployable alone")


def _row(variant: Variant) -> list[str]:
    """-> the cells of a variant, under COLUMNS."""
    accuracy, latency = variant.accuracy, variant.latency
    cells = [
        f"{variant.name} ({variant.runtime})",
        f"`{variant.file}`",
        megabytes(variant.bytes),
        f"{variant.precision.stored} / {variant.precision.computed}",
    ]
    if accuracy:
        interval = within(accuracy.interval.low, accuracy.interval.high)
        cells += [
            f"{percent(accuracy.value)} ({interval}, n = {accuracy.n})",
            percent(accuracy.top1_agreement),
            accuracy.verdict.summary,
        ]
    else:
        cells += ["not measured"] * 3
    if latency:
        cells += [
            f"{latency.p50_ms:.2f} / {latency.p95_ms:.2f}",
            f"{latency.best_images_per_second:.0f} ({latency.best_batch})",
        ]
    else:
        cells += ["not measured"] * 2
    return cells


def _measured_on(manifest: Manifest) -> str:
    measured = [variant.latency for variant in manifest.variants if variant.latency]
    machines = {latency.where for latency in measured}
    if not machines:
        return "Speed was not measured."
    return (
        f"Speed on {'; '.join(sorted(machines))}, in one short window each: time side by side before a "
        "decision hangs on it."
    )


def _processors(manifest: Manifest) -> str:
    """-> the section that says which processors held the gates; nothing for a bundle that does not record
    it."""
    if not manifest.verified_on:
        return ""
    what = (
        "The golden samples and training's reference images, by each variant's own gate (docs/export.md has "
        "the gates)."
    )
    return f"## Processors\n\n{what}\n\n{processor_table(manifest.verified_on)}"


SET_COLUMNS = (
    "variant",
    "`--sets`",
    "sets that hold the right class",
    "classes in a set",
    "of the worst class",
    "answered",
    "of those right",
)


def _sets(manifest: Manifest) -> str:
    """-> the section about prediction sets and abstention; nothing for a bundle without."""
    calibrated = [(variant.name, variant.details.sets) for variant in manifest.variants]
    given = [(name, sets) for name, sets in calibrated if sets is not None]
    if not given:
        return ""
    rows = []
    for name, level in [(name, level) for name, sets in given for level in sets.levels]:
        found = level.measured
        shares = map(percent, (found.worst_class, found.answered, found.answered_right))
        rows.append([name, level.name, percent(found.coverage), f"{found.mean_size:.2f}", *shares])
    sets, found = given[0][1], given[0][1].levels[0].measured
    note = f" ({sets.note})" if sets.note else ""
    said = (
        f"Calibrated on {sets.images} {sets.split} images{note}, measured on {found.images} {found.split} "
        "images. At least the share in `--sets` of images like those have their class in their set, on "
        "average over calibrations; of the answers that are given at least that share is right, in "
        f"{percent(1 - sets.delta, 0)} of calibrations. docs/decisions.md says what that does not promise."
    )
    return f"## Sets and abstention\n\n{said}\n\n{table(SET_COLUMNS, rows)}"


CASCADE_COLUMNS = ("variant", "deferred", "accuracy against the last exit", "ms at batch 1", "ms at batch 64")


def _cascade(manifest: Manifest) -> str:
    """-> the section about the exits of a cascade; nothing for another target."""
    records = [(variant.name, variant.details.cascade) for variant in manifest.variants]
    given = [(name, record) for name, record in records if record is not None]
    if not given:
        return ""
    rows = []
    for name, record in given:
        points, interval = 100 * record.against_last.delta, record.against_last.interval
        change = f"{points:+.2f} points ({within(interval.low, interval.high)})"
        times = [f"{one.cascade_ms:.2f} of {one.last_ms:.2f}" for one in record.times]
        rows.append([name, percent(record.deferred), change, *times])
    first, last = given[0][1].exits
    chosen = given[0][1].threshold
    promises = [
        f"costs at most {chosen.max_loss_points:g} points of accuracy" if chosen.max_loss_points else "",
        f"defers at most {percent(chosen.max_deferred)} of the images" if chosen.max_deferred else "",
    ]
    note = f" ({chosen.note})" if chosen.note else ""
    said = (
        f"`{first}` answers where it is sure enough; others are deferred to `{last}`, which goes on from "
        f"what {first} computed. The output `exit` says which answered. The threshold was chosen on "
        f"{chosen.images} {chosen.split} images{note} so that it {' and '.join(filter(None, promises))}, in "
        f"{percent(1 - chosen.delta, 0)} of such choices. Times are means over batches of test images, of "
        "those of the same file with every image deferred."
    )
    return f"## Cascade\n\n{said}\n\n{table(CASCADE_COLUMNS, rows)}"


FAMILIARITY_COLUMNS = ("variant", "threshold", "test images kept")


def _familiarity(manifest: Manifest) -> str:
    """-> the section about the output `familiarity`; nothing for a bundle without."""
    calibrated = [(variant.name, variant.details.familiarity) for variant in manifest.variants]
    given = [(name, found) for name, found in calibrated if found is not None]
    if not given:
        return ""
    kinds = list(given[0][1].drawn)
    rows = []
    for name, found in given:
        told = [f"{one.auroc:.3f}, {percent(one.called_familiar)}" for one in found.drawn.values()]
        rows.append([name, f"{found.threshold:.2f}", percent(found.test_kept), *told])
    first = given[0][1]
    note = f" ({first.note})" if first.note else ""
    said = (
        "An image whose output `familiarity` is below the threshold is unlike the training images; "
        f"{percent(first.kept, 0)} of images like {first.images} {first.split} images{note} are not. Of "
        "drawn pictures: the chance that a test image is more familiar than one (AUROC), and how many the "
        "threshold lets pass. docs/decisions.md says what that does not promise: a photograph of another "
        "class is mostly familiar."
    )
    return f"## Familiarity\n\n{said}\n\n{table((*FAMILIARITY_COLUMNS, *kinds), rows)}"


def _calibration(manifest: Manifest) -> str:
    calibration = manifest.calibration
    if calibration is None:
        return "The probabilities are the softmax of the logits; they were not calibrated."
    if not calibration.fitted_on:
        ece = calibration.ece_after
        error = "" if ece is None else f" Expected calibration error on the test images: {ece:.4f}."
        return f"`probabilities` = softmax(logits): {calibration.note}.{error}"
    note = f" ({calibration.note})" if calibration.note else ""
    fitted = (
        f"`probabilities` = softmax(logits / {calibration.temperature:.4f}); the temperature was fitted on "
        f"{calibration.fitted_on} {calibration.split} images{note}."
    )
    if calibration.ece_before is None or calibration.ece_after is None:
        return fitted
    return (
        f"{fitted} Expected calibration error on the test images: {calibration.ece_before:.4f} before, "
        f"{calibration.ece_after:.4f} after."
    )
