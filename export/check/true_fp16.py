"""What an fp16 file computes where fp16 is computed in fp16: every tensor rounded to 16 bits,
overflow and all.

ONNX Runtime's CPU has no fp16 kernels and computes such files in fp32, so its answers say nothing about a
GPU's. onnx's reference implementation takes the types as they are written. Sums of products are accumulated
in fp32, as tensor cores do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.check.evaluation import Reference, class_balanced
from ffl_deploy.errors import CheckError, first_line
from ffl_deploy.parity import PARITY_GATES, ParityMetrics, compare, differ_most, judge
from ffl_deploy.runtime.replay import whole_batches

IMAGES = 16
SECONDS = 30.0
"""After which no further image is evaluated; the first always is."""


def check_true_fp16(
    path: Path,
    reference: Reference,
    batch: int | None = None,
    locate: Callable[[np.ndarray], str] | None = None,
) -> ParityMetrics:
    """Compare the fp16 file `path`, computed in true fp16, with PyTorch's logits on some images;
    -> what was measured.

    Args: batch: the only size that the file takes, None for any; locate: images -> the layer where they begin
    to differ, asked after a failure with the image that differs most.
    Raises CheckError where the fp16 gate does not hold.
    """
    rows = class_balanced(reference.labels, IMAGES)
    logits, end = [], time.monotonic() + SECONDS
    run = evaluator(path)
    for start in range(0, len(rows), batch or 1):
        images = whole_batches(reference.images[rows[start : start + (batch or 1)]], batch)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what is looked for here
                logits += list(run.run(["logits"], {"images": images})[0][: len(rows) - start])
        except Exception as error:  # the reference raises what NumPy and its operators raise
            reason = first_line(error)
            raise CheckError(
                f"{path.name} cannot be computed in true fp16 by onnx.reference: {reason}"
            ) from error
        if time.monotonic() > end:
            break
    rows, found = rows[: len(logits)], np.array(logits, np.float32)
    metrics = compare(reference.logits[rows], found)
    verdict = judge({str(len(logits)): metrics}, PARITY_GATES["fp16"])
    if verdict.failed:
        worst = rows[differ_most(reference.logits[rows], found)]
        place = f"; {locate(reference.images[worst])}" if locate else ""
        raise CheckError(
            f"{path.name} does not give PyTorch's logits where fp16 is computed in fp16, as GPUs do, "
            f"although it does on this CPU, which computes it in fp32 ({verdict.findings[0]}{place}); use "
            "--precision bf16."
        )
    return metrics


def intermediates(proto: Any, tensors: Sequence[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """-> tensor name -> float32 value on `images`, computed in true fp16."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = evaluator(proto).run(None, {"images": images}, intermediate=True)
    return {name: np.asarray(found[name], np.float32) for name in tensors}


def evaluator(model: Any) -> Any:
    """model: a file, or what was read of one. -> onnx.reference.ReferenceEvaluator of it; products in fp32 by
    NumPy's BLAS, which has none for fp16."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.ops import op_conv, op_gemm, op_matmul

    def accumulating(base: Any) -> Any:
        def _run(self: Any, *inputs: Any, **attributes: Any) -> Any:
            wide = [value if value is None else value.astype(np.float32) for value in inputs]
            return tuple(value.astype(inputs[0].dtype) for value in base._run(self, *wide, **attributes))

        name = "Gemm" if base.__name__.startswith("Gemm") else base.__name__
        return type(name, (base,), {"op_domain": "", "_run": _run})

    return ReferenceEvaluator(
        str(model) if isinstance(model, Path) else model,
        new_ops=[accumulating(one) for one in (op_conv.Conv, op_gemm.Gemm_7, op_matmul.MatMul)],
    )
