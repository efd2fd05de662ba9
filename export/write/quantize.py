"""fp32 ONNX -> int8 ONNX, in the two forms that their runtimes need, from one calibration or from training's
own scales.

No single QDQ file serves both: ONNX Runtime's CPU wants uint8 activations (S8S8 leaves half the convolutions
in float), TensorRT wants symmetric int8 ones (it refuses a zero point that is not zero).

Each form: a file is written by each method and compared (int8_choice.py), the best one is written (qdq.py)
and certified; which method is chosen does not depend on the processor that exports. Scales that training
learned go in as `Scales`: by the tensors' names in the fp32 file, used as they are; whatever they leave out
is calibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.computed import float_operators, operator_histogram, temporary_folder
from export.write.graph_parts import OPERATORS, blocks, name_nodes
from export.write.int8_choice import Judges, choose, sensitive_blocks
from export.write.onnx_file import check_onnx
from export.write.qdq import Scales, write_form
from export.write.ranges import METHODS, collect_ranges
from ffl_deploy.errors import CheckError
from ffl_deploy.manifest import Candidate, Certificate, Quantization
from ffl_deploy.saturation import certify

FILES = {"cpu": "model.int8.onnx", "tensorrt": "model.int8-tensorrt.onnx"}  # form -> its file
TRAINED = "trained"
"""The method where training learned under the very rounding."""


@dataclass(frozen=True)
class Form:
    """One of the two quantised files, how it was chosen, and the proof that it cannot saturate."""

    path: Path
    choice: Quantization
    certificate: Certificate


@dataclass(frozen=True)
class Attempts:
    """Files of one form, written by any method and compared.

    proto: the pre-processed fp32 model; ranges: method -> range of every tensor; scratch: the
    file of an attempt.
    """

    form: str
    proto: Any
    ranges: dict[str, Any]
    scales: Scales
    scratch: Path
    judges: Judges

    def write(self, path: Path, method: str, float_layers: Sequence[str]) -> None:
        write_form(self.proto, path, self.ranges[method], self.form, float_layers, self.scales)

    def measure(self, method: str, float_layers: Sequence[str]) -> Candidate:
        self.write(self.scratch, method, float_layers)
        return self.judges.candidate(self.scratch, method, float_layers)

    def ranked(self, method: str) -> list[list[str]]:
        """-> blocks of layers by falling sensitivity."""

        def divergence(float_layers: list[str]) -> float:
            self.write(self.scratch, method, float_layers)
            return self.judges.divergence(self.scratch)

        return sensitive_blocks(blocks(self.proto), divergence)


def quantize(
    source: Path, folder: Path, images: np.ndarray, judges: Judges, scales: Scales | None = None
) -> dict[str, Form]:
    """Write `model.int8.onnx` (CPU) and `model.int8-tensorrt.onnx` into `folder`; -> form -> Form.

    Args: source: the verified fp32 file; images: class-balanced training images uint8 [n, h, w, 3], the
    evaluation view; judges: what the files are compared on; scales: training's own, where it learned them.
    Raises CheckError where a convolution of the CPU form stays in float that was not chosen to, or a file
    could saturate.
    """
    scales = scales or Scales()
    # nothing is calibrated where training has ranges: TensorRT's form, which is symmetric, takes the larger
    # of their ends
    methods = (TRAINED,) if scales.activations else METHODS
    forms = {}
    with temporary_folder(source) as temporary:
        prepared = temporary / "prepared.onnx"
        proto = prepare(source, prepared)
        ranges = collect_ranges(prepared, images, OPERATORS, judges.batch)
        ranges[TRAINED] = with_trained(ranges["minmax"], scales)
        for form, name in FILES.items():
            # choose
            attempts = Attempts(form, proto, ranges, scales, temporary / "trial.onnx", judges)
            chosen, candidates = choose(attempts.measure, attempts.ranked, methods)

            # write
            path = folder / name
            attempts.write(path, chosen.method, chosen.float_layers)
            check_onnx(path)

            # prove
            certificate = certify(path)
            if not certificate.holds:
                raise CheckError(f"{name} could saturate on processors without VNNI ({certificate}).")
            choice = Quantization(chosen, candidates, len(images), len(judges.held.images))
            forms[form] = Form(path, choice, certificate)
    require_int8(proto, forms["cpu"])
    return forms


def prepare(source: Path, prepared: Path) -> Any:
    """Write `source` as the quantizer wants it, shapes inferred and nodes named, to `prepared`; -> the
    model."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(source, prepared, skip_symbolic_shape=True)  # the shapes are static but for the batch
    proto = onnx.load(prepared)
    name_nodes(proto)
    onnx.save(proto, prepared)
    return proto


def require_int8(proto: Any, form: Form) -> None:
    """Raises CheckError where more convolutions of the CPU's file run in float than were chosen to."""
    convolutions = {node.name for node in proto.graph.node if node.op_type == "Conv"}
    meant = len(convolutions & set(form.choice.chosen.float_layers))
    found = float_operators(operator_histogram(form.path))
    if found > meant:
        raise CheckError(f"{found} convolutions of the int8 file run in float where {meant} were meant to.")


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
