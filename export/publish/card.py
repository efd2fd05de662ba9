"""The model card: a bundle's README.md, written from its manifest and nothing else."""

from __future__ import annotations

from ffl_deploy.manifest import Manifest, Variant
from ffl_deploy.verified_on import markdown

_STRONG = {
    "fused": "the fused classifier of Feature Fusion Learning: every branch's features, fused",
    "ensemble": "the ensemble: the mean of the branches' logits",
    "gated": "the gated ensemble of ONE: a learned, input-dependent mean of the branches' logits",
}


def model_card(manifest: Manifest) -> str:
    """-> Markdown: what it is, how good, how to use it, where it comes from, what it cannot do."""
    source, shape = manifest.source, manifest.input.preprocessing
    what = _STRONG.get(manifest.target, "one sub-network, deployable alone")
    classes = ", ".join(manifest.classes[:10]) + (
        f" and {len(manifest.classes) - 10} more" if len(manifest.classes) > 10 else ""
    )
    lines = [
        f"# {manifest.target}: {' + '.join(source.branches)} on {source.data}",
        "",
        f"An image classifier ({what}), trained with the method `{source.method}` and exported to ONNX.",
        "",
        f"- Input `images`: uint8, {manifest.input.layout}, RGB, {shape.height} x {shape.width} pixels "
        f"(`{shape.resize}` resize); normalisation is inside the graph."
        + (
            f" Exactly {manifest.input.batch} at a time; ffl-predict fills up the last batch."
            if manifest.input.batch
            else ""
        ),
        f"- Outputs: {', '.join(f'`{output.name}` {output.shape}' for output in manifest.outputs)}.",
        f"- Classes ({len(manifest.classes)}): {classes}.",
        f"- Parameters: {source.parameters:,}.",
        "",
        "## Measured",
        "",
        "| variant | file | MB | precision stored / computed | accuracy (95 % interval) | agrees with "
        "PyTorch | accuracy gate | ms per image p50 / p95 | images/s (batch) |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(variant) for variant in manifest.variants),
        "",
        _measured_on(manifest),
        "",
        *_verified_on(manifest),
        "## Use",
        "",
        "    ffl-verify .",
        "    ffl-predict . photo.jpg --out predictions.jsonl",
        "",
        "```python",
        "from ffl_deploy import load_bundle",
        "",
        'prediction = load_bundle(".").predict(["photo.jpg"])[0]',
        "print(prediction.label, prediction.confidence)",
        "```",
        "",
        "## Calibration",
        "",
        _calibration(manifest),
        "",
        "## Where it comes from",
        "",
        f"Run `{source.run}`, checkpoint `{source.checkpoint}` of epoch {source.epoch} "
        f"(weights SHA-256 `{source.checkpoint_sha256}`).",
        (
            f"Golden samples: {manifest.golden.count} images ({manifest.golden.origin}) with PyTorch's own "
            "logits."
        ),
        f"Made with {', '.join(f'{name} {version}' for name, version in manifest.toolchain.items())}.",
        "",
        "## Limits",
        "",
        (
            f"It knows {len(manifest.classes)} classes and answers one of them for every image, even one "
            "that shows none."
        ),
        "The accuracy holds for images like the test images; measure it on your own before you rely on it.",
        "",
    ]
    return "\n".join(lines)


def _row(variant: Variant) -> str:
    accuracy, latency = variant.accuracy, variant.latency
    cells = [
        f"{variant.name} ({variant.runtime})",
        f"`{variant.file}`",
        f"{variant.bytes / 1e6:.2f}",
        f"{variant.precision.stored} / {variant.precision.computed}",
    ]
    if accuracy:
        interval = accuracy.interval
        cells += [
            (
                f"{100 * accuracy.value:.2f} % ({100 * interval.low:.2f} to {100 * interval.high:.2f}, n = "
                f"{accuracy.n})"
            ),
            f"{100 * accuracy.top1_agreement:.2f} %",
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
    return f"| {' | '.join(cells)} |"


def _measured_on(manifest: Manifest) -> str:
    measured = [variant.latency for variant in manifest.variants if variant.latency]
    machines = {f"{latency.threads} threads of {latency.machine}" for latency in measured}
    if not machines:
        return "Speed was not measured."
    return (
        f"Speed on {'; '.join(sorted(machines))}, in one short window each: time side by side before a "
        "decision hangs on it."
    )


def _verified_on(manifest: Manifest) -> list[str]:
    """-> the section that says which processors held the gates;
    nothing for a bundle that does not record it."""
    if not manifest.verified_on:
        return []
    what = (
        "The golden samples and training's reference images, by each variant's own gate (docs/export.md has "
        "the gates)."
    )
    return ["## Processors", "", what, "", *markdown(manifest.verified_on), ""]


def _calibration(manifest: Manifest) -> str:
    calibration = manifest.calibration
    if calibration is None:
        return "The probabilities are the softmax of the logits; they were not calibrated."
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
