"""What `--precision` offers: one row for each precision,
which says how its files are written from the verified fp32 file.

A precision may have several files (int8 has one for each kind of processor),
each with the runtimes that can verify it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from export.cascade import Cascade, choose_threshold
from export.check.evaluation import Evaluation, Reference, answers_of, class_balanced
from export.check.exits import exit_logits
from export.check.gates import HeldOut, file_batches
from export.check.localize import TRUE_FP16, first_difference
from export.check.true_fp16 import check_true_fp16
from export.sets import CalibrationImages
from export.write.cascade_graph import ALL, CascadeModel, write_threshold
from export.write.half import write_half
from export.write.int8_choice import Held, Judges
from export.write.magnitudes import largest_magnitudes
from export.write.onnx_graph import DeployedModel, GraphOptions, write_onnx
from export.write.quantize import quantize
from export.write.ranges import IMAGES
from export.write.trained_scales import trained_scales
from ffl_deploy.bundle_files import GoldenSamples
from ffl_deploy.contract import KEY, contract
from ffl_deploy.errors import CheckError
from ffl_deploy.manifest import DEFAULT_VARIANT, CascadeThreshold, Details, InputTensor, Precision, Variant
from ffl_deploy.parity import PARITY_GATES
from ffl_deploy.probes import Probes
from ffl_deploy.runtime import RUNTIMES
from ffl_deploy.selfcheck import judged

VALIDATION_IMAGES = 512  # on which quantisation methods are compared


@dataclass(frozen=True)
class ModelFile:
    """A written ONNX file that is still to be verified.

    runtimes: those to do that on; the first one names the variant. engine: TensorRT builds from it. on_cpu:
    whether a CPU is what it is for; the speed of a file for a GPU is not measured on one. threshold: of a
    cascade, the file's own.
    """

    name: str
    path: Path
    stored: str
    runtimes: tuple[str, ...]
    details: Details = field(default_factory=Details)
    engine: bool = True
    on_cpu: bool = True
    threshold: CascadeThreshold | None = None


@dataclass(frozen=True)
class TargetContext:
    """One target in PyTorch, with everything that its files are compared with.

    golden: what ffl-verify will judge the files by; golden_files: the names of its images,
    where they are the user's own; sets: what prediction sets are calibrated on, None where nobody asked;
    cascade: its exits, where the target is one.
    """

    name: str
    model: DeployedModel
    reference: Reference
    test: HeldOut
    evaluation: Evaluation
    golden: GoldenSamples
    golden_files: tuple[str, ...]
    checkpoint_sha256: str
    probes: Probes | None = None
    sets: CalibrationImages | None = None
    cascade: Cascade | None = None

    def judged(self, images: np.ndarray, logits: np.ndarray, precision: str) -> Held:
        """-> images and PyTorch's logits as ffl-verify will ask them of a file at this precision."""
        return Held(*judged(images, logits, self.probes, PARITY_GATES[precision]))

    def compared(self, threshold: CascadeThreshold | None, precision: str) -> Reference:
        """-> the reference images and logits that a file of this precision is compared with; threshold: of a
        cascade, the file's own."""
        if self.cascade is None or threshold is None:
            return self.reference
        whole = self.evaluation.reference(self.cascade.exits[0])
        return routed_reference(self.cascade, whole, threshold.value, precision)

    def locator(
        self, path: Path, precision: str, source: Path, batch: int | None, runtime: str = "onnxruntime"
    ) -> Callable[[np.ndarray], str]:
        """-> images -> the first layer of `path`, written from the fp32 file `source`, that differs from this
        target's in PyTorch. Arguments as of first_difference."""

        def locate(images: np.ndarray) -> str:
            return first_difference(path, self.model, images, precision, source, runtime, batch)

        return locate

    @cached_property
    def extras(self) -> dict[str, np.ndarray]:
        """Further output (cam, embedding) -> PyTorch's values on the reference images."""
        if not self.model.extras:
            return {}
        values = answers_of(self.model, self.reference.images)
        named = zip(self.model.output_names, values, strict=True)
        return {name: value for name, value in named if name in self.model.extras}


def routed_reference(cascade: Cascade, whole: Reference, threshold: float, precision: str) -> Reference:
    """-> the images of `whole`, all reference images, whose exit the rounding of this precision does not
    choose, with the logits of the exit that answers."""
    kept = cascade.reference.clear(threshold, precision)
    return Reference(whole.images[kept], whole.labels[kept], cascade.reference.routed(threshold)[kept])


def write_fp32(
    folder: Path, context: TargetContext, graph: GraphOptions, runtimes: Sequence[str]
) -> ModelFile:
    """Write `folder/model.onnx`, from which every other file is made once it has been verified.
    Raises CheckError."""
    source, shape = folder / "model.onnx", context.evaluation.run.preprocessing
    run = context.evaluation.run
    metadata = {
        "ffl.target": context.name,
        "ffl.checkpoint_sha256": context.checkpoint_sha256,
        KEY: contract(
            context.name,
            run.classes,
            InputTensor(run.preprocessing, batch=graph.batch),
            context.model.temperature,
        ),
    }
    write_onnx(context.model, source, shape.height, shape.width, graph, metadata)
    if file_batches(source) != graph.batch:
        raise CheckError(f"the exporter froze the batch of {source.name} to {file_batches(source)}.")
    threshold = context.cascade.threshold if context.cascade else None
    return ModelFile(DEFAULT_VARIANT, source, "fp32", tuple(runtimes), threshold=threshold)


def _fp16(
    source: Path, context: TargetContext, batch: int | None, runtimes: Sequence[str]
) -> list[ModelFile]:
    path = source.with_name("model.fp16.onnx")
    magnitudes = largest_magnitudes(source, context.evaluation.calibration_images(IMAGES), batch)
    record = write_half(source, path, "fp16", magnitudes)

    # ONNX Runtime's CPU computes such a file in fp32, so its answers there say nothing about a GPU's.
    locate = context.locator(path, TRUE_FP16, source, batch)
    record = msgspec.structs.replace(
        record, true_fp16=check_true_fp16(path, context.reference, batch, locate)
    )
    return [ModelFile("fp16", path, "fp16", tuple(runtimes), Details(half=record))]


def _bf16(
    source: Path, context: TargetContext, batch: int | None, runtimes: Sequence[str]
) -> list[ModelFile]:
    path = source.with_name("model.bf16.onnx")
    record = write_half(source, path, "bf16")
    # ONNX Runtime's CPU has no bf16 convolution; OpenVINO computes it where the processor has it.
    return [ModelFile("bf16", path, "bf16", ("openvino",), Details(half=record))]


def last_logits(context: TargetContext) -> np.ndarray:
    """-> the logits of a cascade's last exit of the golden images [n, classes], in PyTorch."""
    import torch

    model = context.model
    assert isinstance(model, CascadeModel)
    with torch.inference_mode():
        images = torch.from_numpy(context.golden.images)
        first = model.target.first(model.normalise(images))
        return model.target.last(first, torch.arange(len(images))).numpy()


def with_own_threshold(path: Path, cascade: Cascade, images: CalibrationImages) -> CascadeThreshold:
    """Give a cascade's file a threshold that keeps the promise for its own scores, the fp32 file's where that
    does; -> what was chosen. Raises CheckError where none does."""
    stored = Precision("int8", "int8")
    unmeasured = Variant(path.name, "onnxruntime", path.name, sha256="", bytes=0, precision=stored)
    exits = exit_logits(path, unmeasured, images.split)
    shared = cascade.threshold.value
    threshold = choose_threshold(exits, images.split.labels, cascade.promise, images, shared=shared)
    write_threshold(path, path, threshold.value)
    return threshold


def _int8(
    source: Path, context: TargetContext, batch: int | None, runtimes: Sequence[str]
) -> list[ModelFile]:
    evaluation, validation = context.evaluation, context.evaluation.data.validation
    rows = class_balanced(validation.labels, VALIDATION_IMAGES)
    verified = tuple(Held(one.images, one.logits) for one in (context.golden, context.reference))
    judging, scales, cascade = context.name, None, context.cascade
    whole = source
    if cascade:  # every image through every layer, which the ranges and the choice have to see
        judging = cascade.exits[1]
        reference = evaluation.reference(judging)
        golden = Held(context.golden.images, last_logits(context))
        verified = (golden, Held(reference.images, reference.logits))
        whole = write_threshold(source, source.with_name("model.whole.onnx"), ALL)
    elif evaluation.quantized is not None:
        scales = trained_scales(evaluation.quantized, context.name, source)
    held = Held(validation.read(rows), evaluation.validation_logits[judging][rows])
    judges = Judges(held=held, verified=verified, batch=batch)
    forms = quantize(whole, source.parent, evaluation.calibration_images(IMAGES), judges, scales)
    details = {
        name: Details(quantisation=form.choice, certificate=form.certificate) for name, form in forms.items()
    }
    computing = tuple(name for name in runtimes if RUNTIMES[name].int8)
    if cascade:  # TensorRT has no NonZero, and would need two engines
        whole.unlink()
        forms["tensorrt"].path.unlink()
        path = forms["cpu"].path
        threshold = with_own_threshold(path, cascade, evaluation.calibration)
        return [ModelFile("int8", path, "int8", computing, details["cpu"], engine=False, threshold=threshold)]
    return [
        ModelFile("int8", forms["cpu"].path, "int8", computing, details["cpu"], engine=False),
        ModelFile(
            "int8-tensorrt",
            forms["tensorrt"].path,
            "int8",
            ("onnxruntime",),
            details["tensorrt"],
            on_cpu=False,
        ),
    ]


@dataclass(frozen=True)
class Format:
    """A precision beside fp32.

    write: (verified fp32 file, target, the only batch size or None, runtimes that were asked for) -> its
    files, beside the fp32 one; needs: runtimes without which it cannot be verified, whichever were asked for.
    """

    precision: str
    write: Callable[[Path, TargetContext, int | None, Sequence[str]], list[ModelFile]]
    needs: tuple[str, ...] = ()


FORMATS = {
    row.precision: row
    for row in (Format("fp16", _fp16), Format("bf16", _bf16, needs=("openvino",)), Format("int8", _int8))
}
