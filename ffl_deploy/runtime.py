"""A bundle's variant -> Session. One interface over the runtimes that can execute it.

Runtimes are imported when a session is opened, so a machine needs only the one it uses.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ffl_deploy.command import choices_sentence
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.onnx_wire import refuse_external_data

if TYPE_CHECKING:
    from ffl_deploy.bundle import Bundle, Variant


class Outputs(NamedTuple):
    """A batch's answers."""

    logits: np.ndarray  # float32 [n, classes]
    probabilities: np.ndarray  # float32 [n, classes]
    cam: np.ndarray | None = None  # float32 [n, h, w], where the bundle was exported with --cam
    embedding: np.ndarray | None = None  # float32 [n, features], where the bundle's graph gives it


class Session(ABC):
    """An open model. `run` may be called from several threads at once."""

    runtime: str
    variant: str
    computed: str | None = None  # precision the processor computes in, where the runtime can tell; else the file's own

    @abstractmethod
    def run(self, images: np.ndarray) -> Outputs:
        """images: uint8 [n, height, width, 3] -> Outputs with n rows."""


class OnnxRuntimeSession(Session):
    """ONNX Runtime on the CPU."""

    runtime = "onnxruntime"

    def __init__(self, model: Path, variant: str, threads: int | None = None) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only; warnings are about graph clean-up the user did not write
        # Spinning workers burn the cores that decoding needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.variant = variant
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ORT's exception classes have no common public base
            raise CheckError(f"ONNX Runtime {ort.__version__} cannot load {model}: {str(error).strip()}") from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, images: np.ndarray) -> Outputs:
        try:
            values: list[Any] = self._session.run(self._outputs, {"images": images})
        except Exception as error:
            raise CheckError(f"ONNX Runtime cannot run a batch of {len(images)}: {str(error).strip()}") from error
        return Outputs(**dict(zip(self._outputs, values, strict=True)))


def import_onnxruntime() -> Any:
    """-> the onnxruntime module, its telemetry off (it must be switched off before the import). Raises UsageError."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError("ONNX Runtime is not installed; run: pip install 'ffl-deploy[cpu]' (or [gpu]).") from error
    return onnxruntime


def available_cores() -> int:
    """-> cores this process may use, which in a container is often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


RUNTIMES: dict[str, type[OnnxRuntimeSession]] = {"onnxruntime": OnnxRuntimeSession}


def open_session(bundle: Bundle, variant: Variant, runtime: str | None = None, threads: int | None = None) -> Session:
    """Open `variant` after checking its file's hash. `runtime` defaults to the one the variant was verified with.

    Raises CheckError (file changed, model refused), UsageError (unknown or missing runtime).
    """
    name = runtime or variant.runtime
    if name not in RUNTIMES:
        raise UsageError(f"there is no runtime {name!r}. {choices_sentence(name, list(RUNTIMES))}")
    model = bundle.checked_file(variant.file)
    if model.suffix == ".onnx":
        refuse_external_data(model)
    return RUNTIMES[name](model, variant.name, threads)
