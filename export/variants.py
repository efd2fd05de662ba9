"""A bundle's variants: which files there are for the asked precisions, and each one verified on each asked runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from export.check.evaluation import Evaluation, Reference, class_balanced
from export.check.gates import HeldOut, check_extras, check_golden, check_parity, file_batches, measure_accuracy, require_accuracy
from export.check.latency import measure_latency
from export.check.localize import first_difference
from export.check.true_fp16 import check_true_fp16
from export.computed import computed_precision
from export.write.half import write_half
from export.write.magnitudes import largest_magnitudes
from export.write.onnx_graph import DeployedModel, GraphOptions, write_onnx
from export.write.quantize import Held, quantize
from export.write.ranges import IMAGES
from export.write.tensorrt_engine import EngineOptions, build_engine
from ffl_deploy.bundle_files import GoldenSamples
from ffl_deploy.errors import CheckError
from ffl_deploy.host import available_cores
from ffl_deploy.manifest import DEFAULT_VARIANT, Details, HalfRecord, Precision, Variant
from ffl_deploy.parity import gate_precision
from ffl_deploy.runtime import RUNTIMES, OnnxRuntimeSession, Session
from ffl_deploy.runtime.session import FixedBatchSession

VALIDATION_IMAGES = 512  # on which quantisation methods are compared


@dataclass(frozen=True)
class VariantOptions:
    """precisions and runtimes: what to write, and where to verify it; fp32 and onnxruntime are always among them."""

    precisions: tuple[str, ...] = ("fp32",)
    runtimes: tuple[str, ...] = ("onnxruntime",)
    graph: GraphOptions = field(default_factory=GraphOptions)
    engines: EngineOptions | None = None


@dataclass(frozen=True)
class ModelFile:
    """A written ONNX file that is still to be verified; `runtimes` are those to do that on.

    on_cpu: whether a CPU is what it is for; the speed of a file for a GPU is not measured on one.
    """

    name: str
    path: Path
    stored: str
    runtimes: tuple[str, ...]
    details: Details = field(default_factory=Details)
    on_cpu: bool = True


@dataclass(frozen=True)
class TargetContext:
    """One target in PyTorch, with everything that its files are compared with.

    golden: what ffl-verify will judge the files by; golden_files: the names of its images, where they are the user's own.
    """

    name: str
    model: DeployedModel
    reference: Reference
    test: HeldOut
    evaluation: Evaluation
    golden: GoldenSamples
    golden_files: tuple[str, ...]
    checkpoint_sha256: str

    @cached_property
    def extras(self) -> dict[str, np.ndarray]:
        """Further output (cam, embedding) -> PyTorch's values on the reference images."""
        import torch

        if not self.model.extras:
            return {}
        with torch.inference_mode():
            values = self.model(torch.from_numpy(self.reference.images))
        return {
            name: value.numpy() for name, value in zip(self.model.output_names, values, strict=True) if name in self.model.extras
        }


def build_variants(folder: Path, context: TargetContext, options: VariantOptions) -> list[Variant]:
    """Write and verify everything that `options` asks for into `folder`, fp32 first. Raises CheckError, UsageError."""
    variants = []
    for file in write_files(folder, context, options):
        variants += [verified(file, runtime, context, folder, options.graph.batch) for runtime in file.runtimes]
        if options.engines and file.name != "int8":  # the CPU form, which TensorRT refuses
            variants.append(engine_variant(file, folder, context, options.engines))
    return variants


def check_runtimes(options: VariantOptions) -> None:
    """Raises UsageError where a runtime that is needed is not installed or cannot start; before any work is done."""
    for name in dict.fromkeys([*options.runtimes, *(["openvino"] if "bf16" in options.precisions else [])]):
        RUNTIMES[name].require()


def write_files(folder: Path, context: TargetContext, options: VariantOptions) -> Iterator[ModelFile]:
    """Write the ONNX files one by one; fp32 comes first and must have been verified before the next is asked for."""
    run, model = context.evaluation.run, context.model
    source = folder / "model.onnx"
    metadata = {"ffl.target": context.name, "ffl.checkpoint_sha256": context.checkpoint_sha256}
    write_onnx(model, source, run.preprocessing.height, run.preprocessing.width, options.graph, metadata)
    if file_batches(source) != options.graph.batch:
        raise CheckError(f"the exporter froze the batch of {source.name} to {file_batches(source)}. No bundle was written.")
    yield ModelFile(DEFAULT_VARIANT, source, "fp32", options.runtimes)
    for precision in options.precisions:
        if precision in ("fp16", "bf16"):
            path = folder / f"model.{precision}.onnx"
            details = Details(half=write_half_checked(source, path, precision, context, options.graph.batch))
            # ONNX Runtime's CPU has no bf16 convolution; OpenVINO computes both formats where the processor has them.
            yield ModelFile(precision, path, precision, options.runtimes if precision == "fp16" else ("openvino",), details)
        elif precision == "int8":
            evaluation, validation = context.evaluation, context.evaluation.data.validation
            rows = class_balanced(validation.labels, VALIDATION_IMAGES)
            held = Held(validation.read(rows), evaluation.validation_logits[context.name][rows])
            golden = Held(context.golden.images, context.golden.logits)
            forms = quantize(source, folder, evaluation.calibration_images(IMAGES), held, golden, options.graph.batch)
            # Each form has its runtimes: TensorRT refuses the zero points of the CPU's, also behind ONNX Runtime.
            through_tensorrt = tuple(name for name in options.runtimes if name == "onnxruntime-tensorrt")
            others = tuple(name for name in options.runtimes if name not in through_tensorrt)
            for name, form, runtimes in (
                ("int8", forms["cpu"], others),
                ("int8-tensorrt", forms["tensorrt"], ("onnxruntime", *through_tensorrt)),
            ):
                details = Details(quantisation=form.choice, certificate=form.certificate)
                yield ModelFile(name, form.path, "int8", runtimes, details, on_cpu=name == "int8")


def write_half_checked(source: Path, path: Path, precision: str, context: TargetContext, batch: int | None) -> HalfRecord:
    """Write a 16-bit file; -> what the manifest keeps of it. fp16 is computed once as GPUs compute it. Raises CheckError."""
    if precision == "bf16":  # its range is fp32's
        return write_half(source, path, precision)
    magnitudes = largest_magnitudes(source, context.evaluation.calibration_images(IMAGES), batch)
    record = write_half(source, path, precision, magnitudes)
    return msgspec.structs.replace(record, true_fp16=check_true_fp16(path, context.reference, batch))


def verified(file: ModelFile, runtime: str, context: TargetContext, folder: Path, batch: int | None) -> Variant:
    """Open `file` on `runtime`, hold it to the gates of its precision, measure it. Raises CheckError."""
    name = file.name if runtime == file.runtimes[0] else f"{file.name}-{runtime}"
    session, computed, details = open_file(file, runtime, name)
    if batch:
        session = FixedBatchSession(session, batch)
    precision = gate_precision(file.stored, computed)

    def locate(images: np.ndarray) -> str:
        if batch:
            images = np.resize(images, (batch, *images.shape[1:]))
        return first_difference(file.path, context.model, images, precision, folder / "model.onnx", runtime)

    parity = check_parity(session, context.reference, precision, context.model.temperature, locate)
    check_golden(session, context.golden, context.golden_files, precision, context.model.temperature)
    many, callers = session, 1
    if runtime == "onnxruntime" and not batch:  # a batch on each core needs no barrier behind every layer
        many, callers = OnnxRuntimeSession(file.path, name, threads=1), available_cores()
    accuracy = require_accuracy(measure_accuracy(many, context.test, precision, callers), name)
    extras = check_extras(session, context.reference, context.extras, precision)
    timed = file.on_cpu or runtime != "onnxruntime"
    return msgspec.structs.replace(
        Variant.of_file(folder, file.path, name, runtime, Precision(file.stored, computed)),
        parity=parity,
        accuracy=accuracy,
        latency=measure_latency(session.run, context.reference.images) if timed else None,
        details=msgspec.structs.replace(details, extras=extras),
    )


def open_file(file: ModelFile, runtime: str, name: str) -> tuple[Session, str, Details]:
    """-> (session, the precision it computes in, read back from the runtime, details for the manifest)."""
    if runtime == "openvino":
        from ffl_deploy.runtime.openvino_runtime import OpenVinoSession

        opened = OpenVinoSession(file.path, name, precision=file.stored)
        return opened, opened.computed or file.stored, msgspec.structs.replace(file.details, layers=opened.layer_precisions())
    session = OnnxRuntimeSession(file.path, name, runtime=runtime)  # first: it says in a sentence why a file is refused
    computed, histogram = computed_precision(file.path)
    if runtime != "onnxruntime":  # a GPU provider computes in what the file stores
        computed = file.stored
    return session, computed, msgspec.structs.replace(file.details, operators=histogram)


def engine_variant(file: ModelFile, folder: Path, context: TargetContext, options: EngineOptions) -> Variant:
    """Build a TensorRT engine from a verified file. Its own parity is checked where it can run: by ffl-verify on a GPU."""
    name = f"{file.name.removesuffix('-tensorrt')}-engine"
    path = folder / "engines" / f"{name.removesuffix('-engine')}.engine"
    shape = context.evaluation.run.preprocessing
    record = build_engine(file.path, path, shape.height, shape.width, options)
    variant = Variant.of_file(folder, path, name, "tensorrt", Precision(file.stored, file.stored))
    return msgspec.structs.replace(variant, details=Details(engine=record))
