"""A bundle's variants: which files there are for the asked precisions,
and each one verified on each asked runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import msgspec
import numpy as np

from export.check.exits import check_exits, exit_agreement, exit_times
from export.check.gates import (
    ACCURACY_BATCH,
    check_extras,
    check_golden,
    check_parity,
    judge_answers,
    require_accuracy,
)
from export.computed import computed_precision
from export.drawn import KINDS, draw
from export.formats import FORMATS, ModelFile, TargetContext, write_fp32
from export.outputs import FAMILIARITY
from export.outputs.familiarity import calibrated
from export.progress import Progress
from export.sets import Answered, calibrate_sets
from export.write.onnx_graph import GraphOptions
from export.write.tensorrt_engine import Routing, write_engine
from ffl_deploy.data.datasets import ArraySplit, Split
from ffl_deploy.errors import CheckError, OtherMachine, UsageError
from ffl_deploy.familiarity import Familiarity
from ffl_deploy.host import available_cores
from ffl_deploy.manifest import CascadeRecord, Details, Precision, RefusedVariant, Variant
from ffl_deploy.parity import gate_precision
from ffl_deploy.runtime import OnnxRuntimeSession, Session, runtime_named
from ffl_deploy.runtime.latency import measure_latency
from ffl_deploy.runtime.replay import batch_of, run_in_batches
from ffl_deploy.runtime.session import FixedBatchSession, Outputs
from ffl_deploy.runtime.tensorrt_build import EngineOptions, require_targets
from ffl_deploy.runtime.tensorrt_cache import bundled
from ffl_deploy.runtime.tensorrt_cascade import open_engine
from ffl_deploy.sets import CalibratedSets
from ffl_deploy.statistics import paired_difference


@dataclass(frozen=True)
class VariantOptions:
    """precisions and runtimes: what to write, and where to verify it;
    fp32 and onnxruntime are always among them."""

    precisions: tuple[str, ...] = ("fp32",)
    runtimes: tuple[str, ...] = ("onnxruntime",)
    graph: GraphOptions = field(default_factory=GraphOptions)
    engines: EngineOptions | None = None


@dataclass
class Built:
    """What came of everything that was asked for."""

    variants: list[Variant] = field(default_factory=list)
    refused: list[RefusedVariant] = field(default_factory=list)

    @contextlib.contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """A check that fails inside the block costs `name`, and nothing else."""
        try:
            yield
        except CheckError as error:
            self.refused.append(RefusedVariant(name, str(error)))


def build_variants(
    folder: Path, context: TargetContext, options: VariantOptions, progress: Progress
) -> Built:
    """Write and verify everything that `options` asks for into `folder`, fp32 first; what does not pass is
    not there any more. Raises CheckError where the fp32 file is refused, from which all others are made;
    UsageError."""
    built = Built()

    def finish(file: ModelFile) -> None:
        for runtime in file.runtimes:
            progress.step(f"{context.name}: verifying and timing {variant_name(file, runtime)} on {runtime}")
            with built.trying(variant_name(file, runtime)):
                built.variants.append(verified(file, runtime, context, folder, options.graph.batch))
            if not built.variants or built.variants[-1].file != file.path.name:
                return  # its own runtime refuses it
        if options.engines and file.engine:
            progress.step(f"{context.name}: building a TensorRT engine")
            with built.trying(engine_name(file)):
                built.variants.append(
                    engine_variant(file, folder, context, options.engines, options.graph.batch)
                )

    # The fp32 file first: what the others are made from has then given PyTorch's logits.
    progress.step(f"{context.name}: tracing the graph")
    fp32 = write_fp32(folder, context, options.graph, options.runtimes)
    finish(fp32)
    if not built.variants:
        raise CheckError(built.refused[0].reason)
    progress.finished()
    for precision in options.precisions:
        if precision in FORMATS:
            progress.step(f"{context.name}: writing {precision}, of several candidates the nearest")
            files: list[ModelFile] = []
            with built.trying(precision):
                files = FORMATS[precision].write(fp32.path, context, options.graph.batch, options.runtimes)
            for file in files:
                finish(file)
            progress.finished()
    remove_refused(folder, built.variants)
    return built


def remove_refused(folder: Path, variants: Sequence[Variant]) -> None:
    """Leave in `folder` the files of `variants` alone, and the records beside engines."""
    kept = {variant.file for variant in variants}
    kept |= {str(PurePosixPath(name).with_suffix(".json")) for name in kept if name.startswith("engines/")}
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in kept:
            path.unlink()


def check_runtimes(options: VariantOptions) -> None:
    """Raises UsageError where a runtime that is needed is not installed or cannot start;
    before any work is done."""
    needed = [
        name for precision in options.precisions if precision in FORMATS for name in FORMATS[precision].needs
    ]
    for name in dict.fromkeys([*options.runtimes, *needed]):
        runtime_named(name).require()
    if options.engines:
        require_targets(options.engines)


def verified(
    file: ModelFile, runtime: str, context: TargetContext, folder: Path, batch: int | None
) -> Variant:
    """Open `file` on `runtime`, hold it to the gates of its precision, measure it. Raises CheckError."""
    name = variant_name(file, runtime)
    session, computed, details = open_file(file, runtime, name)
    variant = Variant.of_file(folder, file.path, name, runtime, Precision(file.stored, computed))
    variant = msgspec.structs.replace(variant, details=details)
    opened = Opened(FixedBatchSession(session, batch) if batch else session)
    if runtime == "onnxruntime" and not batch:  # a batch on each core needs no barrier behind every layer
        many = OnnxRuntimeSession(file.path, name, threads=1)
        opened = Opened(session, many, available_cores())
    return measured(variant, opened, file, context, folder, batch)


class Opened(NamedTuple):
    """A variant's session. many, callers: the session for the whole test set (None: the same), and from
    how many threads to ask it."""

    session: Session
    many: Session | None = None
    callers: int = 1


def measured(
    variant: Variant, opened: Opened, file: ModelFile, context: TargetContext, folder: Path, batch: int | None
) -> Variant:
    """Hold `opened`, a variant of `file`, to the gates of its precision; -> the variant with what was
    measured of it. Raises CheckError."""
    session = opened.session
    precision = gate_precision(variant.precision.stored, variant.precision.computed)

    locate = context.locator(file.path, precision, folder / "model.onnx", batch, variant.runtime)

    # the gates: training's logits, the golden samples, the test images, further outputs
    reference, golden = (
        context.judged(samples.images, samples.logits, precision)
        for samples in (context.compared(file.threshold, precision), context.golden)
    )
    parity = check_parity(session, reference, precision, context.model.temperature, locate)
    check_golden(session, golden, context.golden_files, precision, context.model.temperature)
    answers = answers_to(opened, context.test.split)
    accuracy = judge_answers(answers, context.test, precision)
    extras = check_extras(session, context.reference, context.extras, precision)

    # its speed, where this machine is one that it is for
    timed = file.on_cpu or variant.runtime != "onnxruntime"
    latency = measure_latency(session.run, context.reference.images, gpu=session.gpu) if timed else None
    return msgspec.structs.replace(
        variant,
        parity=parity,
        accuracy=require_accuracy(accuracy, variant.name),
        latency=latency,
        details=msgspec.structs.replace(
            variant.details,
            extras=extras,
            sets=sets_from(opened, answers, context) if context.sets else None,
            familiarity=familiarity_of(opened, answers, context) if FAMILIARITY in context.extras else None,
            cascade=cascade_record(session, file, variant, answers, context) if context.cascade else None,
        ),
    )


def answers_to(opened: Opened, split: Split) -> Outputs:
    """-> logits and probabilities of a whole split."""
    session = opened.many or opened.session
    batch = batch_of(ACCURACY_BATCH, opened.callers, *split.read(slice(0, 1)).shape[1:3])
    return run_in_batches(session.run, split.read, len(split), batch, opened.callers)


def sets_from(opened: Opened, test: Outputs, context: TargetContext) -> CalibratedSets:
    """-> the promises of a variant, from its own answers. test: those to the images that measure them."""
    images = context.sets
    assert images is not None
    held = Answered(answers_to(opened, images.split).probabilities, images.split.labels)
    tested = Answered(test.probabilities, context.test.split.labels)
    return calibrate_sets(held, tested, images, context.test.name)


def familiarity_of(opened: Opened, test: Outputs, context: TargetContext) -> Familiarity:
    """-> a variant's threshold of `familiarity`, from its own answers. test: those to the test images."""
    images, shape = context.evaluation.calibration, context.evaluation.run.preprocessing

    def values(outputs: Outputs) -> np.ndarray:
        assert outputs.familiarity is not None  # check_extras has looked
        return outputs.familiarity

    drawn = {}
    for kind in KINDS:
        pictures = draw(kind, shape.height, shape.width)
        drawn[kind] = values(answers_to(opened, ArraySplit(pictures, np.zeros(len(pictures), np.int64))))
    held = values(answers_to(opened, images.split))
    return calibrated(held, values(test), drawn, (images.name, context.test.name), images.note)


def cascade_record(
    session: Session, file: ModelFile, variant: Variant, answers: Outputs, context: TargetContext
) -> CascadeRecord:
    """Hold the exits of a cascade, and the routing between them, to their gates; -> what was measured.
    answers: to the test images. Raises CheckError."""
    cascade, threshold = context.cascade, file.threshold
    assert cascade is not None
    assert threshold is not None
    assert answers.exit is not None
    precision = gate_precision(variant.precision.stored, variant.precision.computed)
    whole = context.evaluation.reference(cascade.exits[0])
    temperature = context.model.temperature
    check_exits(session, file.path, variant, whole, cascade.reference, cascade.exits, precision, temperature)

    edge = cascade.reference.edge(threshold.value)
    expected = cascade.reference.deferred(threshold.value)[~edge].astype(np.int64)
    test, labels = context.test.split, context.test.split.labels
    last = context.evaluation.test_logits[cascade.exits[1]].argmax(axis=1) == labels
    return CascadeRecord(
        exits=list(cascade.exits),
        threshold=threshold,
        edge=int(edge.sum()),
        exit_agreement=exit_agreement(session, whole.images[~edge], expected, precision),
        deferred=float(answers.exit.mean()),
        against_last=paired_difference(last, answers.logits.argmax(axis=1) == labels),
        times=exit_times(session, file.path, variant, test),
    )


def variant_name(file: ModelFile, runtime: str) -> str:
    return file.name if runtime == file.runtimes[0] else f"{file.name}-{runtime}"


def engine_name(file: ModelFile) -> str:
    return f"{file.name.removesuffix('-tensorrt')}-engine"


def open_file(file: ModelFile, runtime: str, name: str) -> tuple[Session, str, Details]:
    """-> (session, the precision it computes in, read back from the runtime, details for the manifest)."""
    stored = Precision(file.stored, file.stored)
    unmeasured = Variant(name, runtime, file.path.name, sha256="", bytes=0, precision=stored)
    session = runtime_named(runtime).open(file.path, unmeasured, None)
    computed = session.computed or file.stored
    if layers := session.layer_precisions():
        return session, computed, msgspec.structs.replace(file.details, layers=layers)

    # a runtime that does not tell: the graph as ONNX Runtime makes it, which on its CPU is what is computed
    on_cpu, histogram = computed_precision(file.path)
    if runtime == "onnxruntime":
        computed = on_cpu
    return session, computed, msgspec.structs.replace(file.details, operators=histogram)


def engine_variant(
    file: ModelFile, folder: Path, context: TargetContext, options: EngineOptions, batch: int | None
) -> Variant:
    """Build a TensorRT engine from a verified file. Where this machine has the GPU that it is for, it
    is verified and measured as any variant; elsewhere that is left to ffl-verify, or to ffl-engine,
    on such a machine."""
    name = engine_name(file)
    path = folder / "engines" / f"{name.removesuffix('-engine')}.engine"
    routing = None
    if context.cascade and file.threshold:
        routing = Routing(file.threshold.value, context.model.temperature, context.cascade.exits)
    record = write_engine(file.path, path, options, routing)
    variant = Variant.of_file(folder, path, name, "tensorrt", Precision(file.stored, file.stored))
    variant = msgspec.structs.replace(variant, details=Details(engine=record))
    try:
        session = open_engine(bundled(path, record), variant)
    except (UsageError, OtherMachine):  # no GPU, or another one
        return variant
    try:
        opened = Opened(FixedBatchSession(session, batch) if batch else session)
        return measured(variant, opened, file, context, folder, batch)
    finally:
        session.close()
