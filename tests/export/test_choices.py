"""The decisions of export, apart from any model: which quantisation, which artefact, which gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.check.latency import measure_latency
from export.publish.cost import multiply_adds
from export.publish.report import Limits, Row, mark_pareto, recommend
from export.write.quantize import Candidate, choose


def measurer(
    kl: dict[tuple[str, bool, bool], float], calls: list[tuple[str, bool, bool]], unverifiable: Sequence[tuple[str, bool]] = ()
) -> Callable[..., Candidate]:
    def measure(method: str, reduce_range: bool, float_layers: Sequence[str]) -> Candidate:
        key = (method, reduce_range, bool(float_layers))
        calls.append(key)
        return Candidate(
            method, reduce_range, list(float_layers), kl.get(key, 1e-3), 1.0, (method, bool(float_layers)) not in unverifiable
        )

    return measure


def test_the_method_with_the_least_divergence_is_taken_and_reduce_range_only_if_it_helps() -> None:
    calls: list[tuple[str, bool, bool]] = []
    best, candidates = choose(measurer({("entropy", False, False): 5e-4}, calls), ["first", "last"], may_reduce_range=True)
    assert (best.method, best.reduce_range, best.float_layers) == ("entropy", False, [])
    assert calls == [("minmax", False, False), ("percentile", False, False), ("entropy", False, False), ("entropy", True, False)]
    assert len(candidates) == 4
    saturating = {("minmax", False, False): 9e-4, ("minmax", True, False): 1e-4}
    best, _ = choose(measurer(saturating, []), ["first", "last"], may_reduce_range=True)
    assert (best.method, best.reduce_range) == ("minmax", True)
    best, _ = choose(measurer(saturating, []), ["first", "last"], may_reduce_range=False)
    assert best.reduce_range is False


@pytest.mark.parametrize(("with_floats", "kept"), [(2e-3, ["first", "last"]), (9e-3, [])])
def test_float_layers_are_tried_near_the_gate_and_kept_if_they_measure_better(with_floats: float, kept: list[str]) -> None:
    near = {(method, reduce, False): 8e-3 for method in ("minmax", "percentile", "entropy") for reduce in (False, True)}
    near[("minmax", False, True)] = with_floats
    best, candidates = choose(measurer(near, []), ["first", "last"], may_reduce_range=True)
    assert best.float_layers == kept
    assert len(candidates) == 5


def test_a_method_whose_file_ffl_verify_would_refuse_is_not_taken() -> None:
    """A percentile cuts off what an unusual golden image needs, though it is the nearest on the validation split."""
    kl = {("percentile", False, False): 1e-4, ("entropy", False, False): 5e-4}
    best, _ = choose(measurer(kl, [], [("percentile", False)]), ["first", "last"], may_reduce_range=False)
    assert (best.method, best.float_layers) == ("entropy", [])
    none = [(method, floats) for method in ("minmax", "percentile", "entropy") for floats in (False, True)]
    best, _ = choose(measurer(kl, [], none[:-1]), ["first", "last"], may_reduce_range=False)
    assert (best.method, best.float_layers) == ("entropy", ["first", "last"])  # every method's floats are tried
    best, candidates = choose(measurer(kl, [], none), ["first", "last"], may_reduce_range=False)
    assert (best.method, best.golden, len(candidates)) == ("percentile", False, 6)


def row(target: str, variant: str, accuracy: float | None, p50: float | None, size: int, gate: str = "passed") -> Row:
    measured = (accuracy, accuracy, accuracy, 0.0, "passed", gate, p50, p50, 1.0, 1)
    return Row(target, variant, "onnxruntime", "f", size, "fp32 / fp32", 1, 1, *measured)


ROWS = [
    row("fused", "fp32", 0.960, 2.0, 2_000_000),
    row("fused", "int8", 0.957, 0.8, 600_000),
    row("branch0", "fp32", 0.940, 1.0, 1_000_000),
    row("branch0", "int8", 0.935, 0.4, 300_000),
    row("fused", "fp32-engine", None, None, 3_000_000),
]


def test_the_front_is_what_nothing_beats_in_both() -> None:
    assert [r.name for r in mark_pareto(ROWS) if r.pareto] == ["fused/fp32", "fused/int8", "branch0/int8"]
    twins = [row("a", "fp32", 0.9, 1.0, 1), row("b", "fp32", 0.9, 1.0, 1)]
    assert all(r.pareto for r in mark_pareto(twins))


@pytest.mark.parametrize(
    ("limits", "artefact"),
    [
        (Limits(), "fused/int8"),  # within half a point of 96.0 and faster
        (Limits(min_accuracy=0.959), "fused/fp32"),
        (Limits(max_latency_ms=0.5), "branch0/int8"),
        (Limits(max_bytes=600_000), "fused/int8"),
        (Limits(max_bytes=500_000), "branch0/int8"),
        (Limits(min_accuracy=0.95, max_latency_ms=0.5), None),
    ],
)
def test_the_recommendation_keeps_the_limits(limits: Limits, artefact: str | None) -> None:
    recommendation = recommend(ROWS, limits)
    assert recommendation.artefact == artefact
    if artefact is None:
        assert "branch0/int8 comes nearest" in recommendation.reason  # 1.6 % short of the accuracy, where fused is 60 % too slow
        assert "--min-accuracy 0.95" in recommendation.reason


def test_an_unproven_accuracy_is_said_and_an_unmeasured_artefact_never_recommended() -> None:
    unsure = [msgspec.structs.replace(ROWS[1], accuracy_gate="inconclusive (n = 359)")]
    assert "inconclusive (n = 359)" in recommend(unsure, Limits()).reason
    assert recommend([ROWS[4]], Limits()).artefact is None


def test_multiply_adds_are_counted_from_the_shapes(tmp_path: Path) -> None:
    def info(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    weights = {"conv": (8, 2, 3, 3), "tokens": (64, 16), "head": (5, 1024)}  # two groups; head is transposed
    nodes = [
        helper.make_node("Conv", ["images", "conv"], ["maps"], group=2, pads=[1, 1, 1, 1]),  # 8 x 8 x 8 values of 2 x 9 products
        helper.make_node("Reshape", ["maps", "shape"], ["sequence"]),
        helper.make_node("MatMul", ["sequence", "tokens"], ["mixed"]),  # 8 tokens x 16 values of 64 products
        helper.make_node("Concat", ["mixed"] * 8, ["wide"], axis=2),
        helper.make_node("Flatten", ["wide"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head"], ["logits"], transB=1),
    ]
    tensors = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([-1, 8, 64]), "shape"))
    graph = helper.make_graph(nodes, "g", [info("images", ["batch", 4, 8, 8])], [info("logits", ["batch", 5])], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "model.onnx")
    assert multiply_adds(tmp_path / "model.onnx") == 8 * 64 * 18 + 8 * 16 * 64 + 5 * 1024


def test_latency_takes_real_batches_and_the_best_throughput() -> None:
    import time

    seen: set[int] = set()

    def run(images: np.ndarray) -> None:
        seen.add(len(images))
        time.sleep(0.002 + 0.0001 * len(images))  # a fixed cost, so the largest batch is the best

    record = measure_latency(run, np.zeros((10, 4, 4, 3), np.uint8), batches=(1, 16), seconds=0.05)
    assert seen == {1, 16}
    assert record.best_batch == 16
    assert 2.0 < record.p50_ms <= record.p95_ms
    assert record.images_per_second["16"] > record.images_per_second["1"]
