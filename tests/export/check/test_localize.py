"""Where a file starts to differ (the whole search: test_faults.py)."""

from __future__ import annotations

from onnx import helper

from export.check.localize import dequantized


def test_layers_are_compared_as_the_next_one_reads_them() -> None:
    """The CPU form has no ReLU: the lower end of uint8 levels is one.
    What the convolution gives before is no layer's output."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["relu"]),
        helper.make_node("QuantizeLinear", ["relu", "scale", "zero"], ["relu_levels"]),
        helper.make_node("DequantizeLinear", ["relu_levels", "scale", "zero"], ["relu_read"]),
        helper.make_node("DequantizeLinear", ["stored_weight", "scale", "zero"], ["weight"]),
        helper.make_node("Gemm", ["relu_read", "weight"], ["logits"]),
    ]
    assert dequantized(helper.make_model(helper.make_graph(nodes, "g", [], []))) == {"relu": "relu_read"}
