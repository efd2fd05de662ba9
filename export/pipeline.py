"""A run directory -> bundles. For each target: write, compare, measure,
and only then put the bundle in its place."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from export.check.evaluation import Evaluation, Reference, check_target, class_balanced
from export.check.gates import HeldOut
from export.formats import TargetContext
from export.publish.card import model_card
from export.variants import VariantOptions, build_variants, check_runtimes
from export.write.onnx_graph import DeployedModel, require_features
from ffl_deploy import __version__
from ffl_deploy.bundle import Bundle, load_bundle, write_bundle
from ffl_deploy.bundle_files import GoldenSamples
from ffl_deploy.errors import UsageError, choices_sentence
from ffl_deploy.files import replace_folder, shown
from ffl_deploy.manifest import MANIFEST, InputTensor, OutputTensor, Source, Temperature, Variant
from ffl_deploy.networks.checkpoint import LoadedNetwork, load_network
from ffl_deploy.networks.targets import build_target, target_names
from ffl_deploy.processor import description
from ffl_deploy.run_directory import Run
from ffl_deploy.runtime import import_onnxruntime
from ffl_deploy.signing import signature_path
from ffl_deploy.statistics import expected_calibration_error, fit_temperature, log_softmax
from ffl_deploy.verified_on import Outcome, VerifiedOn

GOLDEN_IMAGES = 64
GOLDEN_BYTES = 8 << 20  # of pixels; large images get fewer samples, so that a bundle stays light


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how; `out` receives one folder per target."""

    targets: tuple[str, ...]
    out: Path
    variants: VariantOptions = field(default_factory=VariantOptions)
    checkpoint: str = "best"
    extras: tuple[str, ...] = ()  # further outputs: cam, embedding
    golden: Path | None = None


def export_run(run: Run, options: ExportOptions, report: Callable[[str], None]) -> list[Bundle]:
    """Export every target of `options`. Raises UsageError for what cannot be asked,
    CheckError where a gate does not hold.

    report: receives one line per step. A target's folder appears, or is replaced,
    only when all its gates held.
    """
    loaded = load_network(run, options.checkpoint)
    known = target_names(loaded.network)
    targets = known if "all" in options.targets else list(dict.fromkeys(options.targets))
    for target in targets:
        if target not in known:
            raise UsageError(
                f"{run.folder} has no target {target!r}. {choices_sentence(target, [*known, 'all'])}"
            )
    for target in targets:
        folder = options.out / target
        occupied = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
        if occupied and not (folder / MANIFEST).is_file():
            raise UsageError(
                f"{folder} is there already and is no bundle; choose another --out, or move it away."
            )
    if options.extras:
        for target in targets:
            require_features(build_target(loaded.network, target), options.extras, target)
    check_runtimes(options.variants)
    evaluation = Evaluation(run, loaded.network, options.checkpoint, targets)
    # before any work: a missing one stops here
    references = {target: evaluation.reference(target) for target in targets}
    own = read_golden(options.golden, run) if options.golden else None
    return [
        export_target(target, evaluation, references[target], loaded, options, own, report)
        for target in targets
    ]


def export_target(
    name: str,
    evaluation: Evaluation,
    reference: Reference,
    loaded: LoadedNetwork,
    options: ExportOptions,
    own: dict[str, np.ndarray] | None,
    report: Callable[[str], None],
) -> Bundle:
    """Export one target into `options.out / name`. Raises CheckError where a gate does not hold;
    nothing is left then.

    own: file name -> image uint8 [h, w, 3], the golden images; None takes the run's.
    """
    run = evaluation.run
    target = build_target(loaded.network, name)
    plain = DeployedModel(target, run.mean, run.std).eval()
    check_target(plain, reference, name)
    calibration = calibrate(evaluation, name)
    model = DeployedModel(target, run.mean, run.std, calibration.temperature, options.extras).eval()
    test = HeldOut(evaluation.data.test, evaluation.test_logits[name])
    samples = golden_samples(model, reference, own, run)
    context = TargetContext(
        name, model, reference, test, evaluation, samples, tuple(own or ()), loaded.sha256
    )
    with replace_folder(options.out / name) as folder:
        variants = build_variants(folder, context, options.variants)
        folder_given = options.golden and f"from the folder {options.golden.name}/"
        write_bundle(
            folder,
            target=name,
            classes=run.classes,
            input=InputTensor(run.preprocessing, batch=options.variants.graph.batch),
            outputs=output_tensors(model, run, options.variants.graph.batch),
            source=Source(
                run=run.name,
                checkpoint=options.checkpoint,
                checkpoint_sha256=loaded.sha256,
                epoch=loaded.epoch,
                method=run.model.method,
                branches=list(loaded.network.config.branches),
                data=run.config.data_name,
                parameters=sum(parameter.numel() for parameter in target.parameters()),
            ),
            variants=variants,
            golden=samples,
            origin=folder_given or f"held-out test images of {run.config.data_name}",
            toolchain=toolchain(),
            calibration=calibration,
            card=model_card,
            verified_on=[verified_here(variants)],
        )
    signature_path(options.out / name).unlink(missing_ok=True)  # it was of the bundle before this one
    bundle = load_bundle(options.out / name)
    for variant in bundle.manifest.variants:
        report(f"{shown(bundle.folder)}: {variant.name} {variant_summary(variant)}")
    return bundle


def verified_here(variants: Sequence[Variant]) -> VerifiedOn:
    """-> what the exporting processor computed, of the variants whose gate it could run."""
    outcomes = {}
    for variant in variants:
        if variant.parity:
            installed = (
                version("openvino") if variant.runtime == "openvino" else import_onnxruntime().__version__
            )
            outcomes[variant.name] = Outcome.of(
                variant.parity, variant.runtime, installed, variant.precision.computed
            )
    return VerifiedOn(description(), None, outcomes)


def calibrate(evaluation: Evaluation, target: str) -> Temperature:
    """Fit the temperature on the validation split, which training used for nothing but choosing the epoch."""
    validation, test = evaluation.data.validation, evaluation.data.test
    temperature = fit_temperature(evaluation.validation_logits[target], validation.labels)
    notes = [evaluation.run.config.split.get("note", "")]
    if temperature is None:
        notes.append(
            "no temperature can be fitted where the validation split is classified without error, so it is 1"
        )
        temperature = 1.0
    logits = evaluation.test_logits[target]
    return Temperature(
        temperature=temperature,
        split="validation",
        note="; ".join(filter(None, notes)),
        fitted_on=len(validation.labels),
        ece_before=expected_calibration_error(np.exp(log_softmax(logits)), test.labels),
        ece_after=expected_calibration_error(np.exp(log_softmax(logits / temperature)), test.labels),
    )


def golden_samples(
    model: DeployedModel, reference: Reference, own: dict[str, np.ndarray] | None, run: Run
) -> GoldenSamples:
    """-> `own` images with PyTorch's logits and labels unknown (-1),
    else class-balanced ones of training's evaluation."""
    import torch

    if own is None:
        chosen = class_balanced(reference.labels, _golden_limit(run))
        return GoldenSamples(reference.images[chosen], reference.labels[chosen], reference.logits[chosen])
    images = np.stack(list(own.values()))
    with torch.inference_mode():
        logits = model(torch.from_numpy(images))[0].numpy()
    return GoldenSamples(images, np.full(len(images), -1, dtype=np.int64), logits)


def read_golden(folder: Path, run: Run) -> dict[str, np.ndarray]:
    """-> file name -> image uint8 [h, w, 3], the first ones by name.
    Raises UsageError for an unusable folder."""
    from ffl_deploy.images import SUFFIXES, ImageError, load

    if not folder.is_dir():
        raise UsageError(f"--golden {folder}: there is no such folder; give one with image files.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[: _golden_limit(run)]
    if not paths:
        raise UsageError(f"--golden {folder}: no image files ({', '.join(SUFFIXES)}) in it.")
    try:
        return {path.name: load(path, run.preprocessing) for path in paths}
    except ImageError as error:
        raise UsageError(f"--golden {folder}: an image cannot be used ({error}); remove it.") from error


def _golden_limit(run: Run) -> int:
    return max(
        1, min(GOLDEN_IMAGES, GOLDEN_BYTES // (3 * run.preprocessing.height * run.preprocessing.width))
    )


OUTPUTS = {
    "logits": "unnormalised scores",
    "probabilities": "softmax of logits / temperature",
    "cam": "class activation map of the predicted class, in logits per position",
    "embedding": "pooled features, which the classifier takes",
}


def output_tensors(model: DeployedModel, run: Run, batch: int | None) -> list[OutputTensor]:
    """-> the graph's outputs with the shapes that the model gives; batch: the only one that it takes,
    None for any."""
    import torch

    with torch.inference_mode():
        values = model(
            torch.zeros(1, run.preprocessing.height, run.preprocessing.width, 3, dtype=torch.uint8)
        )
    return [
        OutputTensor(name, [batch or "batch", *value.shape[1:]], OUTPUTS[name])
        for name, value in zip(model.output_names, values, strict=True)
    ]


def variant_summary(variant: Variant) -> str:
    """-> one line for people about a variant that passed."""
    said = [f"({variant.runtime}, {variant.bytes / 1e6:.2f} MB)"]
    if variant.parity:
        worst = max(metrics.scaled_max_diff for metrics in variant.parity.batches.values())
        said.append(f"max logit difference {worst:.1e} of std")
    if variant.accuracy:
        said.append(
            f"accuracy {100 * variant.accuracy.value:.2f} % (PyTorch "
            f"{100 * variant.accuracy.difference.reference_accuracy:.2f} %, "
            f"{variant.accuracy.verdict.summary})"
        )
    if variant.latency:
        said.append(f"{variant.latency.p50_ms:.2f} ms per image")
    return ", ".join(said)


def toolchain() -> dict[str, str]:
    """-> versions of what made the files."""
    import onnx
    import onnxscript
    import torch

    return {
        "ffl-deploy": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
        "onnxruntime": import_onnxruntime().__version__,
    }
