"""The gate between a written file and a bundle: parity with training's stored logits,
then accuracy on the whole test set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from export.check.evaluation import Reference
from export.outputs import FURTHER_OUTPUTS
from ffl_deploy.data.datasets import Split
from ffl_deploy.errors import CheckError
from ffl_deploy.manifest import AccuracyRecord
from ffl_deploy.parity import (
    ACCURACY_GATES,
    PARITY_GATES,
    TIE,
    Finding,
    ParityRecord,
    Verdict,
    compare,
    differ_most,
    judge,
    judge_accuracy,
)
from ffl_deploy.runtime import Session
from ffl_deploy.runtime.replay import golden_batches, images_at_once, measure, run_in_batches
from ffl_deploy.runtime.session import Outputs
from ffl_deploy.statistics import expected_calibration_error, packed, paired_difference, wilson_interval

BATCHES = (1, 2, 7, 64)
"""Compared besides as many reference images as go at once: one, the traced size, an odd one, a common one."""
ACCURACY_BATCH = 64
LOCALIZE_IMAGES = 8
EXTRA_GATES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1, "int8": 0.15}
"""Largest root mean square difference of a map or an embedding, as a share of its standard deviation. fp32,
fp16: as for logits, half of the largest; int8: three times the 0.03 to 0.06 of ResNet-32's maps on
CIFAR-100."""


class Judged(Protocol):
    """Images that a file is compared on: uint8 [n, h, w, 3], and PyTorch's logits float32 [n, classes]."""

    @property
    def images(self) -> np.ndarray: ...
    @property
    def logits(self) -> np.ndarray: ...


class HeldOut(NamedTuple):
    """The images and PyTorch's answers that a variant's accuracy is paired with."""

    split: Split
    logits: np.ndarray  # float32 [n, classes], PyTorch's
    name: str = "test"  # which images they are


def check_parity(
    session: Session,
    reference: Judged,
    precision: str,
    temperature: float,
    locate: Callable[[np.ndarray], str],
    batches: tuple[int, ...] = BATCHES,
) -> ParityRecord:
    """Compare a session with training's logits at every batch size.
    Raises CheckError with all findings and the place.

    Args: precision: whose gate applies; locate: images -> the first layer that differs; called after a
    failure, with the images that differ most (a changed weight need not show on every image).
    """
    most = images_at_once(*reference.images.shape[:3])
    sizes = sorted({min(batch, most) for batch in (*batches, most)})
    try:
        measured = measure(session.run, reference.images, reference.logits, sizes, temperature)
    except CheckError as error:
        raise CheckError(
            f"variant {session.variant} failed before its logits could be compared: {error}"
        ) from error
    gate = PARITY_GATES[precision]
    record = ParityRecord(gate, measured, judge(measured, gate))
    if record.verdict.failed:
        found = "; ".join(str(finding) for finding in record.verdict.findings[:4])
        images = reference.images
        logits = run_in_batches(session.run, images.__getitem__, len(images), ACCURACY_BATCH).logits
        place = locate(images[differ_most(reference.logits, logits, LOCALIZE_IMAGES)])
        raise CheckError(f"variant {session.variant} does not give PyTorch's logits: {found}; {place}.")
    return record


def check_golden(
    session: Session, golden: Judged, files: Sequence[str], precision: str, temperature: float
) -> None:
    """Compare a session with the golden logits as ffl-verify will.
    Raises CheckError that names the images which break the gate.

    That it passed on the reference images does not settle it: a share of few images is another gate, and a
    user's own images are others. files: the names of the images, where they are the user's own.
    """
    gate, sizes = PARITY_GATES[precision], golden_batches(len(golden.images))
    verdict = judge(measure(session.run, golden.images, golden.logits, sizes, temperature), gate)
    if not verdict.failed:
        return
    logits = run_in_batches(session.run, golden.images.__getitem__, len(golden.images), 1).logits
    rows = range(len(logits))
    alone = [row for row in rows if judge({"1": compare(golden.logits[[row]], logits[[row]])}, gate).failed]
    broken = alone or [row for row in rows if logits[row].argmax() != golden.logits[row].argmax()]
    named = ", ".join([files[row] for row in broken if row < len(files)][:5])  # the others are made up
    advice = f"take {named} out of the --golden folder, or " if named else ""
    raise CheckError(
        f"variant {session.variant} does not give PyTorch's logits on the golden images "
        f"({verdict.findings[0]}), so ffl-verify would refuse it; {advice}try another --precision."
    )


def check_extras(
    session: Session, reference: Reference, expected: dict[str, np.ndarray], precision: str
) -> dict[str, float] | None:
    """Compare the further outputs with PyTorch's on the reference images; -> name -> root mean square
    difference, in standard deviations of PyTorch's; None without further outputs. Raises CheckError where one
    is off or not finite.

    expected: name -> [n, ...]. What belongs to the predicted class is compared where both
    sides predict the same.
    """
    if not expected:
        return None
    starts = range(0, len(reference.images), ACCURACY_BATCH)
    outputs = Outputs.joined(
        [session.run(reference.images[start : start + ACCURACY_BATCH]) for start in starts]
    )
    same = outputs.logits.argmax(axis=1) == reference.logits.argmax(axis=1)
    found = {}
    for name, values in expected.items():
        output = getattr(outputs, name)
        if output is None:
            raise CheckError(f"variant {session.variant} gives no output {name}.")
        rows = same if FURTHER_OUTPUTS[name].of_predicted_class else slice(None)
        difference = (output.astype(np.float64) - values)[rows]
        found[name] = (
            float(np.sqrt(np.mean(difference**2))) / (float(values.std()) or 1.0) if len(difference) else 0.0
        )
        if not found[name] <= EXTRA_GATES[precision]:
            raise CheckError(
                f"variant {session.variant}: its output {name} is off PyTorch's by {found[name]:.3g} "
                f"standard deviations (root mean square), the gate is {EXTRA_GATES[precision]:g}."
            )
    return found


def judge_answers(outputs: Outputs, test: HeldOut, precision: str) -> AccuracyRecord:
    """-> a variant's accuracy on the test set by its answers to it, paired with PyTorch's, and whether it
    holds. Does not raise on a failure."""
    labels = test.split.labels
    finite = outputs.finite
    outputs = Outputs(np.nan_to_num(outputs.logits), np.nan_to_num(outputs.probabilities))
    predicted, reference = outputs.logits.argmax(axis=1), test.logits.argmax(axis=1)
    right, was_right = finite & (predicted == labels), reference == labels
    difference = paired_difference(was_right, right)
    top2 = -np.sort(-test.logits, axis=1)[:, :2]
    tied = top2[:, 0] - top2[:, 1] <= TIE * test.logits.std()
    changed_ties = int((tied & (right != was_right)).sum())
    gate = ACCURACY_GATES[precision]
    verdict = judge_accuracy(difference, gate, changed_ties)
    if not finite.all():  # first, whatever the accuracy is
        verdict = Verdict(
            "failed", [Finding("number of images with NaN or infinite outputs", int((~finite).sum()), 0)]
        )
    return AccuracyRecord(
        value=float(right.mean()),
        interval=wilson_interval(int(right.sum()), len(right)),
        n=len(right),
        split=test.name,
        top1_agreement=float((predicted == reference).mean()),
        difference=difference,
        calibration_error=expected_calibration_error(outputs.probabilities, labels),
        gate=gate.precision,
        verdict=verdict,
        right=packed(right),
    )


def require_accuracy(record: AccuracyRecord, variant: str) -> AccuracyRecord:
    """-> `record` where its gate held or could not decide. Raises CheckError."""
    if record.verdict.failed:
        raise CheckError(
            f"variant {variant} does not keep its accuracy: {record.verdict.findings[0]} "
            f"({100 * record.difference.reference_accuracy:.2f} % in PyTorch, {100 * record.value:.2f} % "
            f"here, n = {record.n}); try another --precision."
        )
    return record


def file_batches(path: Path) -> int | None:
    """-> the batch size an ONNX file is fixed to, None where it is dynamic.
    Raises CheckError where it has no batch axis."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise CheckError(f"{path.name} is cut short or damaged ({error}); export again.") from error
    dims = graph.input[0].type.tensor_type.shape.dim
    if len(graph.input) != 1 or graph.input[0].name != "images" or len(dims) != 4:
        raise CheckError(
            f"{path.name} does not take one input images [batch, height, width, 3]; export it again."
        )
    return dims[0].dim_value if dims[0].HasField("dim_value") else None
