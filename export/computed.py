"""What a processor really computes in, read from the graph that ONNX Runtime made of a file,
not from what was asked for."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ffl_deploy.errors import CheckError, FflError
from ffl_deploy.runtime import import_onnxruntime

QUANTIZED = {
    "QLinearConv": "Conv",
    "QGemm": "Gemm",
    "QLinearMatMul": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
}
FLOAT = {
    "Conv": "Conv",
    "FusedConv": "Conv",
    "NhwcFusedConv": "Conv",
    "Gemm": "Gemm",
    "FusedGemm": "Gemm",
    "MatMul": "MatMul",
    "FusedMatMul": "MatMul",
}


@contextlib.contextmanager
def temporary_folder(model: Path) -> Iterator[Path]:
    """Yield a folder for files that are made of `model`. Raises CheckError in place of whatever a library
    raises where there is no room for them: cut files are DecodeError, InvalidProtobuf and worse."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except FflError:
            raise
        except Exception as error:
            if shutil.disk_usage(folder).free < 3 * model.stat().st_size:
                raise CheckError(
                    f"{tempfile.gettempdir()} has too little room for temporary files; free some space "
                    "there, or set TMPDIR to a folder that has some."
                ) from error
            raise


def optimized_graph(path: Path) -> Any:
    """-> the onnx graph as ONNX Runtime's CPU provider executes `path`, all optimisations on."""
    import onnx

    ort = import_onnxruntime()
    with temporary_folder(path) as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath).graph


def operator_histogram(path: Path) -> dict[str, int]:
    """-> operator -> count in the optimised graph, most frequent first."""
    return dict(Counter(node.op_type for node in optimized_graph(path).node).most_common())


def float_operators(histogram: dict[str, int], kind: str = "Conv") -> int:
    """-> how many convolutions (or "Gemm", "MatMul") run in floating point."""
    return sum(count for name, count in histogram.items() if FLOAT.get(name) == kind)


def computed_precision(path: Path) -> tuple[str, dict[str, int]]:
    """-> (precision of most convolutions and matrix products on ONNX Runtime's CPU, operator histogram).

    fp16 convolutions come out as "fp32": the provider has none and casts their inputs.
    """
    graph = optimized_graph(path)
    histogram = Counter(node.op_type for node in graph.node)
    quantized = sum(count for name, count in histogram.items() if name in QUANTIZED)
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    casts = {
        node.output[0]: attribute.i
        for node in graph.node
        if node.op_type == "Cast"
        for attribute in node.attribute
    }
    kinds: Counter[str] = Counter({"int8": quantized})
    for node in graph.node:
        if node.op_type in FLOAT:
            kind = weights.get(node.input[1]) or casts.get(node.input[1]) or 1
            kinds[{10: "fp16", 16: "bf16"}.get(kind, "fp32")] += 1
    return max(kinds, key=lambda name: kinds[name]), dict(histogram.most_common())
