"""fp32 ONNX -> int8 ONNX, in the two forms that their runtimes need, from one calibration.

No single QDQ file serves both: ONNX Runtime's CPU wants uint8 activations (S8S8 leaves half the convolutions in float), TensorRT
wants symmetric int8 ones (it refuses a zero point that is not zero). The method is chosen on the validation split, among those
whose file holds its gate on the golden samples (the logits alone: no label is looked at).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from export.computed import float_operators, operator_histogram
from export.write.onnx_file import check_onnx, finish
from export.write.onnx_graph import SCOPES
from export.write.ranges import METHODS, collect_ranges
from ffl_deploy.errors import CheckError
from ffl_deploy.files import write_atomically
from ffl_deploy.host import available_cores
from ffl_deploy.parity import PARITY_GATES, ParityMetrics, compare, judge
from ffl_deploy.runtime import OnnxRuntimeSession, Session
from ffl_deploy.runtime.replay import run_in_batches
from ffl_deploy.runtime.session import FixedBatchSession

# Without Softmax, which stays behind the logits in fp32, and data movement, which follows its neighbours.
OPERATORS = (
    "Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool",
    "GlobalAveragePool", "Flatten", "Reshape", "Resize", "Pad",
)  # fmt: skip
RISK = 0.5
"""Share of the KL gate from which on accuracy is at risk, so that keeping the ends of the network in float is tried."""


class Candidate(msgspec.Struct, frozen=True):
    """One way to quantise, and how far its logits, on the CPU, are from PyTorch's on the validation split.

    golden: whether the gate holds on the golden images, by which ffl-verify judges the file.
    """

    method: str
    reduce_range: bool
    float_layers: list[str]
    mean_kl: float
    top1_agreement: float
    golden: bool

    @property
    def rank(self) -> tuple[bool, float]:
        """The smaller, the better: a file that ffl-verify would refuse comes behind all that it accepts."""
        return not self.golden, self.mean_kl


class Quantisation(msgspec.Struct, frozen=True):
    """What was chosen among what: kept in the manifest."""

    chosen: Candidate
    candidates: list[Candidate]
    calibration_images: int
    validation_images: int


@dataclass(frozen=True)
class Held:
    """Images uint8 [n, h, w, 3] that a quantised file is compared on, and PyTorch's logits float32 [n, classes]."""

    images: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Form:
    """One of the two quantised files, and how it was chosen."""

    path: Path
    choice: Quantisation


def quantise(
    source: Path, folder: Path, images: np.ndarray, held: Held, golden: Held, batch: int | None = None
) -> dict[str, Form]:
    """Write `model.int8.onnx` (CPU) and `model.int8-tensorrt.onnx` into `folder`; -> form -> Form.

    Args: source: the verified fp32 file; images: class-balanced training images uint8 [n, h, w, 3], the evaluation view; held:
    validation images, which choose the method; golden: what ffl-verify will judge the files by; batch: the only size that the
    file takes, None for any.
    Raises CheckError where a convolution of the CPU form stays in float that was not chosen to.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as temporary:
        prepared = Path(temporary) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)  # the shapes are static but for the batch
        ranges = collect_ranges(prepared, images, OPERATORS, batch)
        proto = onnx.load(prepared)
        trial = Path(temporary) / "trial.onnx"

        forms = {}
        for form, name in (("cpu", "model.int8.onnx"), ("tensorrt", "model.int8-tensorrt.onnx")):

            def measure(method: str, reduce_range: bool, float_layers: Sequence[str], form: str = form) -> Candidate:
                write_form(proto, trial, ranges[method], form, reduce_range, float_layers)
                return _measure(trial, held, golden, batch, method, reduce_range, float_layers)

            # reduce_range answers the saturation of CPUs without VNNI; a GPU has none.
            chosen, candidates = choose(measure, _ends(proto), may_reduce_range=form == "cpu")
            path = folder / name
            write_form(proto, path, ranges[chosen.method], form, chosen.reduce_range, chosen.float_layers)
            check_onnx(path)
            forms[form] = Form(path, Quantisation(chosen, candidates, len(images), len(held.images)))
    convolutions = {node.name for node in proto.graph.node if node.op_type == "Conv"}
    meant = len(convolutions & set(forms["cpu"].choice.chosen.float_layers))
    found = float_operators(operator_histogram(forms["cpu"].path))
    if found > meant:
        raise CheckError(
            f"{found} convolutions of the int8 file run in float where {meant} were meant to. No bundle was written."
        )
    return forms


def choose(
    measure: Callable[[str, bool, Sequence[str]], Candidate], ends: Sequence[str], may_reduce_range: bool
) -> tuple[Candidate, list[Candidate]]:
    """-> (the best candidate, all that were measured), by mean KL on the validation split, of those that can be verified.

    First the method, then `reduce_range`; the first convolution and the classifier are kept in float only where the
    quantised ones come near the gate and floats measure better: they cost speed.
    """
    candidates = [measure(method, False, ()) for method in METHODS]
    best = min(candidates, key=lambda candidate: candidate.rank)
    if may_reduce_range:
        candidates.append(measure(best.method, True, ()))
        best = min(best, candidates[-1], key=lambda candidate: candidate.rank)
    gate = PARITY_GATES["int8"]
    if best.mean_kl > RISK * gate.mean_kl or best.top1_agreement < gate.top1_agreement or not best.golden:
        candidates.append(measure(best.method, best.reduce_range, ends))
        best = min(best, candidates[-1], key=lambda candidate: candidate.rank)
    for other in sorted(candidates[: len(METHODS)], key=lambda candidate: candidate.rank):
        if best.golden:
            break
        if other.method != best.method:
            candidates.append(measure(other.method, False, ends))
            best = min(best, candidates[-1], key=lambda candidate: candidate.rank)
    return best, candidates


def write_form(
    proto: Any, path: Path, ranges: Any, form: str, reduce_range: bool = False, float_layers: Sequence[str] = ()
) -> None:
    """Write one quantised form of the pre-processed model `proto`; weights are int8 per output channel in both."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    # The logits themselves stay in fp32: 256 levels would make ties of close classes.
    options: dict[str, Any] = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
    if form == "tensorrt":
        options |= {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    quantizer = QDQQuantizer(
        model=copy.deepcopy(proto),
        per_channel=True,
        reduce_range=reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8 if form == "cpu" else QuantType.QInt8,
        tensors_range=ranges,
        nodes_to_quantize=[],
        nodes_to_exclude=[*_outside(proto), *float_layers],
        op_types_to_quantize=list(OPERATORS),
        extra_options=options,
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    finish(quantizer.model.model)
    write_atomically(path, quantizer.model.model.SerializeToString(deterministic=True))


def _outside(proto: Any) -> list[str]:
    """-> names of the nodes that are not the network: normalisation, and what joins classifiers, follows the logits or draws
    the map."""
    names = [node.name for node in _tail(proto)[1]]
    behind = {"logits"}
    for node in proto.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "")
        if behind & set(node.input):
            behind |= set(node.output)
        if "'target" not in scopes or behind & set(node.input):
            names.append(node.name)
    return list(dict.fromkeys(names))


def _ends(proto: Any) -> list[str]:
    """-> names of the first convolution and of the classifiers."""
    first = next((node.name for node in proto.graph.node if node.op_type == "Conv"), None)
    return [name for name in (first, *(node.name for node in _tail(proto)[0])) if name]


def _tail(proto: Any) -> tuple[list[Any], list[Any]]:
    """-> (the classifiers, whose matrix products come last on the ways to the logits; the nodes between them and the logits).

    A mean or gate over several classifiers takes their logits as they are: in 256 levels close classes would become ties.
    """
    makers = {name: node for node in proto.graph.node for name in node.output}
    classifiers, between, seen, open_names = [], [], set(), ["logits"]
    while open_names:
        node = makers.get(open_names.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in ("Gemm", "MatMul", "Conv"):  # a convolution where no matrix product is the classifier
            classifiers.append(node)
        else:
            between.append(node)
            open_names += node.input
    return classifiers, between


def _measure(
    path: Path, held: Held, golden: Held, batch: int | None, method: str, reduce_range: bool, float_layers: Sequence[str]
) -> Candidate:
    session: Session = OnnxRuntimeSession(path, "int8", threads=1)
    if batch:
        session = FixedBatchSession(session, batch)

    def compared(with_: Held) -> ParityMetrics:
        outputs = run_in_batches(session.run, with_.images.__getitem__, len(with_.images), 64, callers=available_cores())
        return compare(with_.logits, outputs.logits)

    metrics = compared(held)
    holds = not judge({"64": compared(golden)}, PARITY_GATES["int8"]).failed
    return Candidate(method, reduce_range, list(float_layers), metrics.mean_kl, metrics.top1_agreement, holds)
