"""fp32 ONNX -> int8 ONNX, in the two forms that their runtimes need,
from one calibration or from training's own scales.

No single QDQ file serves both: ONNX Runtime's CPU wants uint8 activations (S8S8 leaves half the convolutions
in float), TensorRT wants symmetric int8 ones (it refuses a zero point that is not zero).

Weights are quantised such that no two products of an output channel can leave 16 bits, whatever kernel adds
them up (ffl_deploy/saturation.py, which proves it on the written file): a processor without VNNI then
computes what one with VNNI does, and which method is chosen does not depend on the processor that exports.
The choice is made on the validation split, among the methods whose file holds its gate on the golden samples
(the logits alone: no label is looked at).

Scales that training learned go in as `Scales`: by the tensors' names in the fp32 file, used as they are;
whatever they leave out is calibrated.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.computed import float_operators, operator_histogram
from export.write.onnx_file import check_onnx, finish
from export.write.ranges import METHODS, collect_ranges
from ffl_deploy.errors import CheckError
from ffl_deploy.files import write_atomically
from ffl_deploy.host import available_cores
from ffl_deploy.manifest import Candidate, Certificate, Quantization
from ffl_deploy.parity import PARITY_GATES, ParityMetrics, compare, judge
from ffl_deploy.runtime import OnnxRuntimeSession, Session
from ffl_deploy.runtime.replay import run_in_batches
from ffl_deploy.runtime.session import FixedBatchSession
from ffl_deploy.saturation import PAIR, certify

# Without Softmax, which stays behind the logits in fp32, and data movement, which follows its neighbours.
# Sigmoid and the product behind it stay in float: between two convolutions they would round three times
# instead of once.
OPERATORS = (
    "Conv", "Gemm", "MatMul", "Add", "Concat", "Relu", "Clip", "LeakyRelu", "MaxPool", "AveragePool",
    "GlobalAveragePool", "Flatten", "Reshape", "Resize", "Pad",
)  # fmt: skip
WEIGHTED = ("Conv", "Gemm", "MatMul")
RISK = 0.5
"""Share of the KL gate from which on accuracy is at risk, so that keeping layers in float is tried."""
BLOCKS = 48
"""Sensitivity is measured of so many parts of a network at most:
neighbouring layers of a deeper one count as one."""
SENSITIVITY_IMAGES = 128
TRAINED = "trained"
"""The method where training learned under the very rounding."""


@dataclass(frozen=True)
class Scales:
    """Scales to use as they are. weights: initializer -> float32 [output channels]; activations: tensor ->
    (scale, zero point 0..255), for the form that stores activations as uint8."""

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    activations: dict[str, tuple[float, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Held:
    """Images uint8 [n, h, w, 3] that a quantised file is compared on,
    and PyTorch's logits float32 [n, classes]."""

    images: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Form:
    """One of the two quantised files, how it was chosen, and the proof that it cannot saturate."""

    path: Path
    choice: Quantization
    certificate: Certificate


def quantize(
    source: Path,
    folder: Path,
    images: np.ndarray,
    held: Held,
    golden: Held,
    batch: int | None = None,
    scales: Scales | None = None,
) -> dict[str, Form]:
    """Write `model.int8.onnx` (CPU) and `model.int8-tensorrt.onnx` into `folder`; -> form -> Form.

    Args: source: the verified fp32 file; images: class-balanced training images uint8 [n, h, w, 3], the
    evaluation view; held: validation images, which choose the method; golden: what ffl-verify will judge the
    files by; batch: the only size that the file takes, None for any; scales: training's own, where it learned
    them.
    Raises CheckError where a convolution of the CPU form stays in float that was not chosen to,
    or a file could saturate.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as temporary:
        prepared = Path(temporary) / "prepared.onnx"
        # the shapes are static but for the batch
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        proto = onnx.load(prepared)
        name_nodes(proto)
        onnx.save(proto, prepared)
        ranges = collect_ranges(prepared, images, OPERATORS, batch)
        ranges[TRAINED] = with_trained(ranges["minmax"], scales or Scales())
        trial = Path(temporary) / "trial.onnx"

        forms = {}
        for form, name in (("cpu", "model.int8.onnx"), ("tensorrt", "model.int8-tensorrt.onnx")):

            def write(path: Path, method: str, float_layers: Sequence[str], form: str = form) -> None:
                write_form(proto, path, ranges[method], form, float_layers, scales)

            def measure(method: str, float_layers: Sequence[str], write: Any = write) -> Candidate:
                write(trial, method, float_layers)
                return _measure(trial, held, golden, batch, method, float_layers)

            def ranked(method: str, write: Any = write) -> list[list[str]]:
                return sensitive_blocks(
                    blocks(proto), lambda layers: _divergence(write, trial, method, layers, held, batch)
                )

            # nothing is calibrated where training has ranges: TensorRT's form, which is symmetric,
            # takes their larger ends
            methods = (TRAINED,) if scales is not None and scales.activations else METHODS
            chosen, candidates = choose(measure, ranked, methods)
            path = folder / name
            write(path, chosen.method, chosen.float_layers)
            check_onnx(path)
            certificate = certify(path)
            if not certificate.holds:
                raise CheckError(
                    f"{name} could saturate on processors without VNNI ({certificate}). No bundle was "
                    "written."
                )
            forms[form] = Form(
                path, Quantization(chosen, candidates, len(images), len(held.images)), certificate
            )
    convolutions = {node.name for node in proto.graph.node if node.op_type == "Conv"}
    meant = len(convolutions & set(forms["cpu"].choice.chosen.float_layers))
    found = float_operators(operator_histogram(forms["cpu"].path))
    if found > meant:
        raise CheckError(
            f"{found} convolutions of the int8 file run in float where {meant} were meant to. No bundle was "
            "written."
        )
    return forms


def with_trained(ranges: Any, scales: Scales) -> Any:
    """-> `ranges` with those that training used in the place of what calibration found."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import TensorData, TensorsData

    known = {
        name: TensorData(
            lowest=np.float32(-zero_point * scale), highest=np.float32((255 - zero_point) * scale)
        )
        for name, (scale, zero_point) in scales.activations.items()
    }
    return TensorsData(CalibrationMethod.MinMax, {**{name: ranges[name] for name in ranges.keys()}, **known})  # noqa: SIM118


def choose(
    measure: Callable[[str, Sequence[str]], Candidate],
    ranked: Callable[[str], list[list[str]]],
    methods: Sequence[str] = METHODS,
) -> tuple[Candidate, list[Candidate]]:
    """-> (the best candidate, all that were measured), by mean KL on the validation split,
    of those that can be verified.

    First the method. Where the best is at risk, blocks of layers stay in float, the most sensitive first,
    twice as many each time, at most half of them: float layers cost speed. Last, the other methods with the
    same layers. ranked: method -> blocks of layers by falling sensitivity; asked only then.
    """
    candidates = [measure(method, ()) for method in methods]
    best = min(candidates, key=lambda candidate: candidate.rank)
    if not at_risk(best):
        return best, candidates
    order, count = ranked(best.method), 1
    while at_risk(best) and count <= max(1, len(order) // 2):
        layers = [name for block in order[:count] for name in block]
        candidates.append(measure(best.method, layers))
        best = min(best, candidates[-1], key=lambda candidate: candidate.rank)
        count *= 2
    for other in sorted(candidates[: len(methods)], key=lambda candidate: candidate.rank):
        if best.golden:
            break
        if other.method != best.method:
            candidates.append(measure(other.method, candidates[-1].float_layers))
            best = min(best, candidates[-1], key=lambda candidate: candidate.rank)
    return best, candidates


def sensitive_blocks(parts: list[list[str]], divergence: Callable[[list[str]], float]) -> list[list[str]]:
    """-> `parts` by falling damage: that of quantising one of them while all the others stay in float.

    divergence: layers that stay in float -> mean KL.
    """
    size = -(-len(parts) // BLOCKS)
    joined = [
        [name for part in parts[start : start + size] for name in part]
        for start in range(0, len(parts), size)
    ]
    damage = [
        divergence([name for other in joined if other is not block for name in other]) for block in joined
    ]
    return [joined[index] for index in np.argsort([-value for value in damage], kind="stable")]


def blocks(proto: Any) -> list[list[str]]:
    """-> the network in parts: each convolution or matrix product with what follows it up to the next one."""
    outside = set(_outside(proto))
    owner: dict[str, int] = {}
    parts: list[list[str]] = []
    for node in proto.graph.node:
        if node.op_type in WEIGHTED and node.name not in outside:
            parts.append([])
            index = len(parts) - 1
        else:
            index = max((owner[name] for name in node.input if name in owner), default=-1)
        if index >= 0:
            owner |= dict.fromkeys(node.output, index)
            if node.op_type in OPERATORS and node.name not in outside:
                parts[index].append(node.name)
    return parts


def write_form(
    proto: Any,
    path: Path,
    ranges: Any,
    form: str,
    float_layers: Sequence[str] = (),
    scales: Scales | None = None,
) -> None:
    """Write one quantised form of the pre-processed model `proto`;
    weights are int8 per output channel in both."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    scales = scales or Scales()
    # The logits themselves stay in fp32: 256 levels would make ties of close classes.
    options: dict[str, Any] = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
    excluded = {*_outside(proto), *_activation_products(proto), *float_layers}
    overrides: dict[str, Any] = _weight_overrides(proto, excluded, scales)
    if form == "tensorrt":
        options |= {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    else:
        overrides |= {
            name: [{"scale": np.array(scale, np.float32), "zero_point": np.array(zero_point, np.uint8)}]
            for name, (scale, zero_point) in scales.activations.items()
        }
    quantizer = QDQQuantizer(
        model=copy.deepcopy(proto),
        per_channel=True,
        reduce_range=False,  # the overrides are narrower where they have to be
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8 if form == "cpu" else QuantType.QInt8,
        tensors_range=ranges,
        nodes_to_quantize=[],
        nodes_to_exclude=sorted(excluded),
        op_types_to_quantize=list(OPERATORS),
        extra_options={**options, "TensorQuantOverrides": overrides},
    )
    quantizer.quantize_model()
    _free_activation_products(quantizer.model.model, set(_activation_products(proto)))
    quantizer.model.topological_sort()
    finish(quantizer.model.model)
    write_atomically(path, quantizer.model.model.SerializeToString(deterministic=True))


def channel_scales(weights: np.ndarray) -> np.ndarray:
    """-> float32 [channels]: the least scales at which no two integer weights
    of a channel add up to more than PAIR.

    weights: float [channels, ...]. At such a scale the two largest of one sign share PAIR = 128 between them:
    where they are alike that is 7 bits, a lone large one may use the eighth.
    """
    rows = weights.reshape(len(weights), -1).astype(np.float64)
    # beside the last stands padding
    ordered = np.sort(np.concatenate([rows, np.zeros((len(rows), 2))], axis=1), axis=1)
    pair = np.maximum(ordered[:, -1] + ordered[:, -2], -(ordered[:, 0] + ordered[:, 1]))
    scales = np.maximum(pair / PAIR, np.abs(rows).max(axis=1, initial=0) / 127)
    # of weights that are all zero
    scales = np.maximum(scales, np.finfo(np.float32).tiny * 2**23).astype(np.float32)
    for _ in range(8):  # rounding to float32 can cost one unit
        wide = np.array([_sum_of_pair(row, scale) > PAIR for row, scale in zip(rows, scales, strict=True)])
        if not wide.any():
            break
        scales = np.where(wide, scales * np.float32(1 + 2**-12), scales).astype(np.float32)
    return scales


def _sum_of_pair(row: np.ndarray, scale: np.float32) -> int:
    from ffl_deploy.saturation import largest_pair

    return largest_pair(np.clip(np.rint(row.astype(np.float32) / scale), -127, 127)[None], 0)


def _weight_overrides(proto: Any, excluded: set[str], scales: Scales) -> dict[str, Any]:
    """-> initializer -> one override a channel, for the weights of every layer that is quantised."""
    from onnx import numpy_helper

    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    overrides: dict[str, Any] = {}
    for node in proto.graph.node:
        if node.op_type not in WEIGHTED or node.name in excluded or len(node.input) < 2:
            continue
        tensor = initializers.get(node.input[1])
        if tensor is None:
            continue
        values = numpy_helper.to_array(tensor)
        transposed = next((attribute.i for attribute in node.attribute if attribute.name == "transB"), 0)
        axis = 0 if node.op_type == "Conv" or (node.op_type == "Gemm" and transposed) else 1
        given = scales.weights.get(tensor.name)
        chosen = (
            channel_scales(np.moveaxis(values, axis, 0)) if given is None else np.asarray(given, np.float32)
        )
        overrides[tensor.name] = [
            {"scale": scale, "zero_point": np.int8(0), **({"axis": axis} if index == 0 else {})}
            for index, scale in enumerate(chosen)
        ]
    return overrides


def _activation_products(proto: Any) -> list[str]:
    """-> names of the products of two activations (attention):
    neither side's 8 bits could be kept from saturating."""
    initializers = {tensor.name for tensor in proto.graph.initializer}
    weighted = [node for node in proto.graph.node if node.op_type in WEIGHTED]
    return [node.name for node in weighted if not initializers & set(node.input[1:2])]


def _free_activation_products(quantized: Any, names: set[str]) -> None:
    """Let the products `names` read what was computed, not what was quantised for others.

    A neighbour's Q/DQ (of the reshape before an attention, say) would otherwise lend both sides 8 bits, and a
    runtime compute the product in them though it was excluded: through operators that only move a tensor,
    too, so these are freed as well.
    """
    from ffl_deploy.saturation import MOVES

    graph = quantized.graph
    makers = {output: node for node in graph.node for output in node.output}
    waiting = [(node, place) for node in graph.node if node.name in names for place in range(2)]
    while waiting:
        node, place = waiting.pop()
        maker = makers.get(node.input[place])
        if maker is not None and maker.op_type == "DequantizeLinear":
            source = makers.get(maker.input[0])
            if source is None or source.op_type != "QuantizeLinear":
                continue  # weights
            node.input[place] = source.input[0]
            maker = makers.get(node.input[place])
        if maker is not None and maker.op_type in MOVES:
            waiting += [
                (maker, index) for index in range(len(maker.input) if maker.op_type == "Concat" else 1)
            ]
    # What nobody reads any more goes: first the dequantisation, then what it read.
    for kind in ("DequantizeLinear", "QuantizeLinear") if names else ():
        read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        for node in [node for node in graph.node if node.op_type == kind and not read & set(node.output)]:
            graph.node.remove(node)


def name_nodes(proto: Any) -> None:
    """Give every node a name of its own: the quantizer tells nodes by it, and optimisers leave some empty."""
    taken = {node.name for node in proto.graph.node}
    seen: set[str] = set()
    for index, node in enumerate(proto.graph.node):
        if not node.name or node.name in seen:
            fresh = f"{node.op_type}_{index}"
            while fresh in taken:
                fresh += "_"
            node.name = fresh
            taken.add(fresh)
        seen.add(node.name)


def _outside(proto: Any) -> list[str]:
    """-> names of the nodes that are not the network: normalisation, and what joins classifiers, follows the
    logits, draws the map or gives the embedding. Told by the graph: an optimiser drops what the exporter
    noted at the nodes."""
    initializers = {tensor.name for tensor in proto.graph.initializer}
    names = [node.name for node in _tail(proto)[1]]
    outputs = {output.name for output in proto.graph.output} - {"logits"}
    before, behind = {"images"}, {"logits"}
    for node in proto.graph.node:
        values = set(node.input) - initializers
        if values and values <= before and node.op_type in ("Cast", "Sub", "Mul", "Div", "Transpose"):
            before |= set(node.output)
            names.append(node.name)
        if behind & set(node.input):
            behind |= set(node.output)
            names.append(node.name)
        if outputs & set(node.output):
            names.append(node.name)
    return list(dict.fromkeys(names))


def _tail(proto: Any) -> tuple[list[Any], list[Any]]:
    """-> (the classifiers, whose matrix products come last on the ways to the logits;
    the nodes between them and the logits).

    A mean or gate over several classifiers takes their logits as they are:
    in 256 levels close classes would become ties.
    """
    makers = {name: node for node in proto.graph.node for name in node.output}
    classifiers, between, seen, open_names = [], [], set(), ["logits"]
    while open_names:
        node = makers.get(open_names.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        # a convolution where no matrix product is the classifier
        if node.op_type in ("Gemm", "MatMul", "Conv"):
            classifiers.append(node)
        else:
            between.append(node)
            open_names += node.input
    return classifiers, between


def at_risk(candidate: Candidate) -> bool:
    gate = PARITY_GATES["int8"]
    low = candidate.mean_kl > RISK * gate.mean_kl or candidate.top1_agreement < gate.top1_agreement
    return low or not candidate.golden


def _measure(
    path: Path, held: Held, golden: Held, batch: int | None, method: str, float_layers: Sequence[str]
) -> Candidate:
    metrics = _compared(path, held, batch)
    holds = not judge({"64": _compared(path, golden, batch)}, PARITY_GATES["int8"]).failed
    return Candidate(
        method=method,
        float_layers=list(float_layers),
        mean_kl=metrics.mean_kl,
        top1_agreement=metrics.top1_agreement,
        golden=holds,
    )


def _divergence(
    write: Any, path: Path, method: str, layers: list[str], held: Held, batch: int | None
) -> float:
    """-> mean KL with `layers` in float, on some of the images."""
    write(path, method, layers)
    return _compared(
        path, Held(held.images[:SENSITIVITY_IMAGES], held.logits[:SENSITIVITY_IMAGES]), batch
    ).mean_kl


def _compared(path: Path, held: Held, batch: int | None) -> ParityMetrics:
    session: Session = OnnxRuntimeSession(path, "int8", threads=1)
    if batch:
        session = FixedBatchSession(session, batch)
    outputs = run_in_batches(
        session.run, held.images.__getitem__, len(held.images), 64, callers=available_cores()
    )
    return compare(held.logits, outputs.logits)
