"""A run directory -> bundles. For each target: write, compare, measure, and only then put the
bundle in its place."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.cascade import Cascade, Exits, Promise, choose_threshold
from export.check.evaluation import Evaluation, check_target
from export.check.gates import HeldOut
from export.formats import FORMATS, TargetContext, routed_reference
from export.golden import determined, golden_samples, read_golden
from export.outputs import FURTHER_OUTPUTS
from export.outputs.familiarity import FIT_IMAGES
from export.progress import Progress
from export.publish.card import model_card
from export.temperature import calibrate
from export.variants import VariantOptions, build_variants, check_runtimes
from export.write.cascade_graph import EXIT, CascadeModel
from export.write.onnx_graph import DeployedModel, has_features, require_features
from ffl_deploy import __version__
from ffl_deploy.bundle import Bundle, load_bundle, write_bundle
from ffl_deploy.errors import CheckError, UsageError, choices_sentence
from ffl_deploy.files import entries, replace_folder, shown
from ffl_deploy.manifest import (
    DEFAULT_VARIANT,
    MANIFEST,
    InputTensor,
    OutputTensor,
    Source,
    Variant,
    read_manifest,
)
from ffl_deploy.markdown import megabytes, percent
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.networks.mutual import MutualNetwork
from ffl_deploy.networks.targets import (
    CASCADE,
    CascadeTarget,
    Target,
    build_target,
    exits_of,
    target_names,
)
from ffl_deploy.probes import Probes, check_pixels
from ffl_deploy.processor import description
from ffl_deploy.report import Refusal
from ffl_deploy.run_directory import CONFIG, Run
from ffl_deploy.runtime import import_onnxruntime, runtime_named
from ffl_deploy.signing import signature_path
from ffl_deploy.verified_on import Outcome, VerifiedOn

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how; `out` receives one folder per target."""

    targets: tuple[str, ...]
    out: Path
    variants: VariantOptions = field(default_factory=VariantOptions)
    checkpoint: str = "best"
    extras: tuple[str, ...] = ()  # names of FURTHER_OUTPUTS
    golden: Path | None = None
    reference_only: bool = False  # judged by the images that training stored, without its data
    sets: bool = False  # calibrate prediction sets and abstention for each variant
    promise: Promise = Promise()  # noqa: RUF009 immutable; of a cascade's threshold


@dataclass
class Exported:
    """What came of an export. A target without a bundle is refused as a whole, by its fp32 file."""

    bundles: list[Bundle] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    def require(self, out: Path) -> None:
        """Raises CheckError that lists what is in no bundle, with its reason."""
        if not self.refused:
            return
        kept = f"The others are in {shown(out)}." if self.bundles else "No bundle was written."
        raise CheckError(f"{'; '.join(str(one).rstrip('.') for one in self.refused)}. {kept}")


def export_run(run: Run, options: ExportOptions, progress: Progress) -> Exported:
    """Export every target of `options`, each with every variant that passes its gates. Raises UsageError for
    what cannot be asked, CheckError where the run itself does not hold.

    progress: is told what is done, and prints a line for each file. A target's folder appears, or is
    replaced, only when its fp32 file has given PyTorch's logits.
    """
    # before any work: whatever can be refused
    loaded = load_network(run, options.checkpoint)
    targets = asked_targets(loaded.network, options, run)
    check_runtimes(options.variants)
    evaluation = Evaluation(run, loaded, options.checkpoint, targets, options.reference_only)
    for classifier in evaluation.targets:
        evaluation.reference(classifier)
    evaluation.data  # noqa: B018 read, and refused, once for all targets
    own = read_golden(options.golden, run) if options.golden else None

    exported = Exported()
    report = progress.line
    files = 1 + sum(precision in FORMATS for precision in options.variants.precisions)
    progress.expect(files * len(targets))
    for target in targets:
        asked = options
        if options.extras and not has_features(build_target(loaded.network, target)):  # "all" asked for it
            asked = replace(options, extras=())
            report(f"{target}: without {' and '.join(options.extras)}, which needs one feature map")
        try:
            bundle = export_target(target, evaluation, asked, own, progress)
        except CheckError as error:
            exported.refused.append(Refusal(target, DEFAULT_VARIANT, str(error)))
            report(f"{target}: no bundle: {error}")
            continue
        for variant in bundle.manifest.variants:
            report(f"{shown(bundle.folder)}: {variant.name} {variant_summary(variant)}")
        for refused in bundle.manifest.refused or []:
            exported.refused.append(Refusal(target, refused.name, refused.reason))
            report(f"{shown(bundle.folder)}: without {refused.name}: {refused.reason}")
        exported.bundles.append(bundle)
    return exported


def asked_targets(network: MutualNetwork, options: ExportOptions, run: Run) -> list[str]:
    """-> names of the targets that `options` asks for, each once. Raises UsageError for one that there is
    not, that cannot give a further output, or whose folder holds something else."""
    known = target_names(network)
    asked = (one for name in options.targets for one in (known if name == "all" else [name]))
    targets = list(dict.fromkeys(asked))
    for target in targets:
        if exits_of(target):
            require_cascade(network, target, options)
        elif target not in known:
            raise UsageError(
                f"{run.folder} has no target {target!r}. {choices_sentence(target, [*known, CASCADE, 'all'])}"
            )
    for target in targets:
        folder = options.out / target
        occupied = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
        if occupied and not (folder / MANIFEST).is_file():
            raise UsageError(
                f"{folder} is there already and is no bundle; choose another --out, or move it away."
            )
        if occupied and (others := foreign_files(folder)):
            raise UsageError(
                f"{folder} holds what ffl-export did not write ({', '.join(others[:3])}), and would be "
                "replaced; choose another --out, or move that away."
            )
    if options.extras and "all" not in options.targets:  # of all, those that can
        for target in targets:
            require_features(build_target(network, target), options.extras, target)
    return targets


def require_cascade(network: MutualNetwork, target: str, options: ExportOptions) -> None:
    """Raises UsageError where `target` is no cascade of this network, or cannot be had with `options`."""
    build_target(network, target)
    refused = [name for name in options.variants.precisions if name in ("fp16", "bf16")]
    for asked, said in (
        (options.variants.graph.batch, "--batch N: how many images are deferred differs"),
        (refused, f"--precision {' and '.join(refused)}: it comes in fp32 and int8"),
        (options.reference_only, "--reference-only: its threshold is chosen on held-out images"),
    ):
        if asked:
            raise UsageError(f"a cascade cannot be exported with {said}; leave that out for {target}.")


def foreign_files(folder: Path) -> list[str]:
    """-> what is in a bundle's folder that its manifest does not list. Raises UsageError where that cannot be
    read: nothing says then whose the folder is."""
    try:
        listed = {MANIFEST, *read_manifest(folder / MANIFEST).files}
    except CheckError as error:
        raise UsageError(
            f"{folder} would be replaced, but {error} Move it away, or choose another --out."
        ) from error
    return sorted(set(entries(folder)) - listed)


def export_target(
    name: str,
    evaluation: Evaluation,
    options: ExportOptions,
    own: dict[str, np.ndarray] | None,
    progress: Progress,
) -> Bundle:
    """Export one target into `options.out / name`. Raises CheckError where a gate does not hold; nothing is
    left then.

    own: file name -> image uint8 [h, w, 3], the golden images; None takes the run's.
    """
    run, loaded, batch = evaluation.run, evaluation.loaded, options.variants.graph.batch

    # PyTorch's side: the target gives the logits that training stored
    progress.step(f"{name}: comparing with training's own logits")
    target = build_target(loaded.network, name)
    cascade = route(evaluation, name, options.promise)
    margins = None
    if cascade is None:
        reference, probes = evaluation.reference(name), run.probes(options.checkpoint, name)
    else:
        whole, threshold = evaluation.reference(cascade.exits[0]), cascade.threshold.value
        reference = routed_reference(cascade, whole, threshold, "fp32")
        margins = cascade.reference.margins(threshold)[cascade.reference.clear(threshold, "fp32")]
        probes = routed_probes(cascade, [run.probes(options.checkpoint, one) for one in cascade.exits])

    constants = fitted_constants(target, evaluation, options.extras)

    def deployed(temperature: float = 1.0) -> DeployedModel:
        if cascade is None:
            return DeployedModel(target, run.mean, run.std, temperature, options.extras, constants).eval()
        assert isinstance(target, CascadeTarget)
        return CascadeModel(target, run.mean, run.std, temperature, cascade.threshold.value).eval()

    plain = deployed()
    check_target(plain, reference, name)
    if probes is not None:
        check_pixels(probes, run.preprocessing, f"{run.folder / CONFIG}")
        probes = determined(probes, plain, float(reference.logits.std()))

    # what goes into the graph, and what its files are compared with
    calibration = calibrate(evaluation, name)
    model = deployed(calibration.temperature)
    context = TargetContext(
        name=name,
        model=model,
        reference=reference,
        test=HeldOut(evaluation.data.test, evaluation.test_logits[name], evaluation.held_out),
        evaluation=evaluation,
        golden=golden_samples(model, reference, own, run, margins),
        golden_files=tuple(own or ()),
        checkpoint_sha256=loaded.sha256,
        probes=probes,
        sets=evaluation.calibration if options.sets else None,
        cascade=cascade,
    )

    # the files, each one verified, then the bundle; its folder appears when all of it is there
    replaces = (options.out / name).is_dir()
    with replace_folder(options.out / name) as folder:
        built = build_variants(folder, context, options.variants, progress)
        folder_given = options.golden and f"from the folder {options.golden.name}/"
        write_bundle(
            folder,
            target=name,
            classes=run.classes,
            input=InputTensor(run.preprocessing, batch=batch),
            outputs=output_tensors(model, run, batch, cascade),
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
            variants=built.variants,
            refused=built.refused,
            golden=context.golden,
            probes=probes,
            origin=folder_given or f"held-out test images of {run.config.data_name}",
            toolchain=toolchain(),
            calibration=calibration,
            card=model_card,
            verified_on=[verified_here(built.variants)],
        )
    if replaces:
        signature_path(options.out / name).unlink(missing_ok=True)  # it was of the bundle before this one
    return load_bundle(options.out / name)


def fitted_constants(
    target: Target, evaluation: Evaluation, extras: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """-> output -> its constants, of those that are fitted to training images; the others need none."""
    fits = {name: fit for name in extras if (fit := FURTHER_OUTPUTS[name].fit)}
    if not fits:
        return {}
    training = evaluation.training_pass(target, FIT_IMAGES)
    return {name: fit(training) for name, fit in fits.items()}


def route(evaluation: Evaluation, name: str, promise: Promise) -> Cascade | None:
    """-> the cascade that `name` names, with its threshold; None where it names another target. From then on
    `evaluation` has its logits under its name. Raises CheckError where no threshold keeps the promise."""
    names = exits_of(name)
    if names is None:
        return None
    images = evaluation.calibration
    held = Exits(*(evaluation.calibration_logits[one] for one in names))
    threshold = choose_threshold(held, images.split.labels, promise, images)
    for logits in (evaluation.test_logits, evaluation.validation_logits):
        logits[name] = Exits(*(logits[one] for one in names)).routed(threshold.value)
    reference = Exits(*(evaluation.reference(one).logits for one in names))
    return Cascade(names, promise, threshold, reference)


def routed_probes(cascade: Cascade, probes: Sequence[Probes | None]) -> Probes | None:
    """-> the made-up pictures with the logits of the exit that answers, NaN at the threshold. probes: those
    of both exits; None in runs from before there were any."""
    first, last = probes
    if first is None or last is None:
        return None
    exits, threshold = Exits(first.logits, last.logits), cascade.threshold.value
    logits = np.where(exits.edge(threshold)[:, None], np.float32(np.nan), exits.routed(threshold))
    return first._replace(logits=logits)


def verified_here(variants: Sequence[Variant]) -> VerifiedOn:
    """-> what the exporting processor computed, of the variants whose gate it could run."""
    outcomes = {}
    for variant in variants:
        if variant.parity:
            engine = variant.details.engine
            installed = engine.version if engine else runtime_named(variant.runtime).version
            outcomes[variant.name] = Outcome.of(
                variant.parity, variant.runtime, installed, variant.precision.computed
            )
    return VerifiedOn(description(), None, outcomes)


ALWAYS_GIVEN = {"logits": "unnormalised scores", "probabilities": "softmax of logits / temperature"}


def output_tensors(
    model: DeployedModel, run: Run, batch: int | None, cascade: Cascade | None = None
) -> list[OutputTensor]:
    """-> the graph's outputs with the shapes that the model gives; batch: the only one that it takes,
    None for any."""
    import torch

    with torch.inference_mode():
        values = model(
            torch.zeros(1, run.preprocessing.height, run.preprocessing.width, 3, dtype=torch.uint8)
        )
    descriptions = ALWAYS_GIVEN | {row.name: row.description for row in FURTHER_OUTPUTS.values()}
    if cascade is not None:
        descriptions[EXIT] = "which classifier answered: 0 {}, 1 {}".format(*cascade.exits)
    return [
        OutputTensor(name, [batch or "batch", *value.shape[1:]], descriptions[name])
        for name, value in zip(model.output_names, values, strict=True)
    ]


def variant_summary(variant: Variant) -> str:
    """-> one line for people about a variant that passed."""
    said = [f"({variant.runtime}, {megabytes(variant.bytes)} MB)"]
    if variant.parity:
        worst = max(metrics.scaled_max_diff for metrics in variant.parity.batches.values())
        said.append(f"max logit difference {worst:.1e} of std")
    else:
        said.append("not verified here")
    if variant.accuracy:
        own, pytorch = variant.accuracy.value, variant.accuracy.difference.reference_accuracy
        verdict = variant.accuracy.verdict.summary
        said.append(f"accuracy {percent(own)} (PyTorch {percent(pytorch)}, {verdict})")
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
