"""OpenVINO on the CPU: the same ONNX files, often faster,
and the one CPU runtime here that computes in bf16 and fp16."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from ffl_deploy.errors import CheckError
from ffl_deploy.host import available_cores
from ffl_deploy.installed import missing
from ffl_deploy.runtime.session import Outputs, Session, outputs_from

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "u8": "int8", "i8": "int8"}
_HEAVY = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")


class OpenVinoSession(Session):
    """An ONNX file in OpenVINO.

    Args: threads: cores to compute on (all); precision: what to compute floating-point layers in. It is
    always set: left alone, OpenVINO takes bf16 on a processor that has it, and an fp32 file is then 1.5e-2
    standard deviations off. Raises UsageError where OpenVINO is not installed, CheckError where the file
    cannot be loaded.
    """

    runtime = "openvino"

    def __init__(
        self, model: Path, variant: str, threads: int | None = None, precision: str = "fp32"
    ) -> None:
        openvino = import_openvino()
        self.variant, self.version = variant, openvino.__version__
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS.get(precision, "f32"),
            "INFERENCE_NUM_THREADS": threads or available_cores(),
            "PERFORMANCE_HINT": "LATENCY",  # one request gets all threads, as in the other runtimes
        }
        try:
            self._compiled = openvino_core().compile_model(model, "CPU", settings)
        except Exception as error:  # OpenVINO raises RuntimeError and its subclasses, and pybind's own
            reason = str(error).strip().splitlines()[-1].strip()
            raise CheckError(f"OpenVINO {openvino.__version__} cannot load {model}: {reason}") from error
        self.computed = self._computed_precision()
        # a request serves one call at a time; as many as callers at once
        self._requests: SimpleQueue[Any] = SimpleQueue()

    def run(self, images: np.ndarray) -> Outputs:
        try:
            request = self._requests.get_nowait()
        except Empty:
            request = self._compiled.create_infer_request()
        try:
            values = request.infer({"images": images})
        except Exception as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise CheckError(f"OpenVINO cannot run a batch of {len(images)}: {reason}") from error
        finally:
            self._requests.put(request)
        # infer() copies the outputs out of the request, so the next caller cannot overwrite them.
        outputs = outputs_from({output.get_any_name(): value for output, value in values.items()})
        # with one core it takes images of another size, and answers with nothing
        if len(outputs.logits) != len(images):
            raise CheckError(
                f"OpenVINO cannot run a batch of {len(images)} images of {list(images.shape[1:])}: "
                f"it answered with {len(outputs.logits)} rows."
            )
        return outputs

    def layer_precisions(self) -> dict[str, int]:
        """-> precision -> number of convolutions and matrix products
        that the compiled model computes in it."""
        counts: Counter[str] = Counter()
        for operation in self._compiled.get_runtime_model().get_ordered_ops():
            info = operation.get_rt_info()
            if info["layerType"].astype(str) in _HEAVY:
                precision = info["runtimePrecision"].astype(str)
                counts[_PRECISIONS.get(precision, precision)] += 1
        return dict(counts)

    def _computed_precision(self) -> str | None:
        counts = self.layer_precisions()
        return max(counts, key=lambda name: counts[name]) if counts else None


@cache
def openvino_core() -> Any:
    """-> the process's one openvino.Core, never given back.

    The CPU plugin of each Core gives the thread that loads it another stack for signal handlers, and takes
    it away with the Core: of two Cores the second one's end puts the first one's freed stack back, and the
    next signal that Python handles (Ctrl-C, the end of a child) ends the process with SIGSEGV.
    Raises UsageError where OpenVINO is not installed.
    """
    return import_openvino().Core()


def import_openvino() -> Any:
    """-> the openvino module. Raises UsageError where it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise missing("openvino") from error
    return openvino
