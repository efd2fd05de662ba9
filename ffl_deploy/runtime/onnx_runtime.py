"""ONNX Runtime: on the CPU, on an NVIDIA GPU (CUDA), and on one through TensorRT."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.host import available_cores
from ffl_deploy.installed import install_command, missing
from ffl_deploy.runtime.session import Outputs, Session, outputs_from


@dataclass(frozen=True)
class Provider:
    """An execution provider: its name in ONNX Runtime, its options,
    and the providers that take what it cannot run."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    behind: tuple[str, ...] = ()


CPU = "CPUExecutionProvider"
PROVIDERS = {
    "onnxruntime": Provider(CPU),
    # The exhaustive search for a convolution algorithm costs seconds once; TF32 would break the fp32 gate.
    "onnxruntime-cuda": Provider(
        "CUDAExecutionProvider",
        {"device_id": "0", "cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": "0"},
        (CPU,),
    ),
    # No engine cache: a cached engine is native code that no hash covers.
    "onnxruntime-tensorrt": Provider(
        "TensorrtExecutionProvider",
        {"device_id": "0", "trt_engine_cache_enable": "0"},
        ("CUDAExecutionProvider", CPU),
    ),
}


class OnnxRuntimeSession(Session):
    """An ONNX file in ONNX Runtime.

    Args: threads: cores to compute on (all); runtime: a key of PROVIDERS.
    Raises CheckError where the file cannot be loaded,
    UsageError where the provider is not there or silently fell back.
    """

    def __init__(
        self, model: Path, variant: str, threads: int | None = None, runtime: str = "onnxruntime"
    ) -> None:
        ort, provider = import_onnxruntime(), require_provider(runtime)
        self.runtime, self.variant = runtime, variant
        self.device = provider.name.removesuffix("ExecutionProvider")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        options.inter_op_num_threads = 1
        # errors only; warnings are about graph clean-up the user did not write
        options.log_severity_level = 3
        # Spinning workers burn the cores that decoding needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = [(provider.name, dict(provider.options)), *((name, {}) for name in provider.behind)]
        try:
            self._session = ort.InferenceSession(model, options, providers=providers)
        except Exception as error:  # ORT's exception classes have no common public base
            raise CheckError(
                f"ONNX Runtime {ort.__version__} cannot load {model}: {_reason(error)}"
            ) from error
        chosen = self._session.get_providers()[0]
        if chosen != provider.name:
            raise UsageError(
                f"ONNX Runtime could not start {provider.name} and fell back to {chosen}; check the GPU's "
                f"driver, CUDA and {'TensorRT' if 'Tensorrt' in provider.name else 'cuDNN'} libraries, or "
                "use --runtime onnxruntime."
            )
        self.version = f"{ort.__version__} {ort.get_build_info()}"
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, images: np.ndarray) -> Outputs:
        try:
            values: list[Any] = self._session.run(self._outputs, {"images": images})
        except Exception as error:
            raise CheckError(f"ONNX Runtime cannot run a batch of {len(images)}: {_reason(error)}") from error
        return outputs_from(dict(zip(self._outputs, values, strict=True)))


def require_provider(runtime: str) -> Provider:
    """-> what `runtime`, a key of PROVIDERS, runs on.
    Raises UsageError where the installed ONNX Runtime has no such provider."""
    ort, provider = import_onnxruntime(), PROVIDERS[runtime]
    if provider.name not in ort.get_available_providers():
        raise UsageError(
            f"this ONNX Runtime {ort.__version__} has no {provider.name} (it has "
            f"{', '.join(ort.get_available_providers())}); run: pip uninstall onnxruntime, then "
            f"{install_command('gpu')}."
        )
    return provider


def import_onnxruntime() -> Any:
    """-> the onnxruntime module, its telemetry off (it must be switched off before the import).
    Raises UsageError."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise missing("onnxruntime", "with an NVIDIA GPU take the extra gpu") from error
    load_cuda(onnxruntime)
    return onnxruntime


@cache
def load_cuda(onnxruntime: Any) -> None:
    """Load CUDA's and cuDNN's libraries from the wheels that the extra `gpu` installs, once a process.

    They lie in `site-packages/nvidia`, where the system's loader does not look; torch, which would have
    loaded them, is not part of a deployment. What cannot be loaded is told by the session that needs it, so
    nothing is printed here.
    """
    wanted = PROVIDERS["onnxruntime-cuda"].name in onnxruntime.get_available_providers()
    if wanted and hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(OSError, RuntimeError):
            onnxruntime.preload_dlls()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
