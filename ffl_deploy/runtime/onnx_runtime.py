"""ONNX Runtime: on the CPU, and on an NVIDIA GPU (CUDA).

Its TensorRT provider is left out: it is built for TensorRT 10 where the newest is 11, it has no switch for
TF32 (an fp32 file would be computed with 10-bit mantissas, which breaks the fp32 gate), and it compiles anew
in every session. `--runtime tensorrt` builds the same engine from the same file, with TF32 off, and keeps it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ffl_deploy.errors import CheckError, DeviceLost, UsageError
from ffl_deploy.host import available_cores
from ffl_deploy.installed import MissingPackage, install_command, missing
from ffl_deploy.runtime import gpu
from ffl_deploy.runtime.onnx_binding import BoundRuns
from ffl_deploy.runtime.session import Outputs, Session, outputs_from, padded_sizes


@dataclass(frozen=True)
class Provider:
    """An execution provider: its name in ONNX Runtime, its options, the providers that take what it cannot
    run, and the device, in ONNX Runtime's words, whose memory it works in."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    behind: tuple[str, ...] = ()
    device: str = "cpu"


CPU = "CPUExecutionProvider"
PROVIDERS = {
    "onnxruntime": Provider(CPU),
    # The exhaustive search for a convolution algorithm costs seconds once for each batch size, of which there
    # are few (padded_sizes); TF32 would break the fp32 gate.
    "onnxruntime-cuda": Provider(
        "CUDAExecutionProvider",
        {"device_id": "0", "cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": "0"},
        (CPU,),
        "cuda",
    ),
}
SMALLEST = (
    b'\x08\x07\x12\x00:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01iZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08'
    b"\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""An ONNX file that gives back what it gets: to see whether a provider starts."""


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
        _require_device(provider)
        self.runtime, self.variant = runtime, variant
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        options.inter_op_num_threads = 1
        # errors only; warnings are about graph clean-up the user did not write
        options.log_severity_level = 3
        # Spinning workers burn the cores that decoding needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = _opened(ort, model, options, provider)
        except Exception as error:  # ORT's exception classes have no common public base
            raise CheckError(
                f"ONNX Runtime {ort.__version__} cannot load {model}: {_reason(error)}"
            ) from error
        _refuse_fallback(self._session, provider)
        self.version = f"{ort.__version__} {ort.get_build_info()}"
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._on_gpu = provider.device != "cpu"
        if self._on_gpu:
            self.device = self.gpu = gpu.described()
            self._bound = BoundRuns(ort, self._session, self._outputs, provider.device)
            self._run = self._bound.run
        else:
            self._run = self._run_plainly

    def run(self, images: np.ndarray) -> Outputs:
        try:
            return outputs_from(self._run(images))
        except CheckError:
            raise
        except Exception as error:
            reason = _reason(error)
            if gpu_lost(reason):
                raise DeviceLost(f"the GPU failed: {reason}; start the command again.") from error
            raise CheckError(f"ONNX Runtime cannot run a batch of {len(images)}: {reason}") from error

    def _run_plainly(self, images: np.ndarray) -> dict[str, np.ndarray]:
        values: list[Any] = self._session.run(self._outputs, {"images": images})
        return dict(zip(self._outputs, values, strict=True))

    def warm_up_sizes(self, largest: int) -> list[int]:
        return padded_sizes(largest) if self._on_gpu else []

    def close(self) -> None:
        if self._on_gpu:
            self._bound.close()


def _opened(ort: Any, model: Path | bytes, options: Any, provider: Provider) -> Any:
    """-> a session of ONNX Runtime; what its Python part prints about a provider is left out, it has our
    sentence."""
    providers = [(provider.name, dict(provider.options)), *((name, {}) for name in provider.behind)]
    with contextlib.redirect_stdout(io.StringIO()):
        return ort.InferenceSession(model, options, providers=providers)


def _refuse_fallback(session: Any, provider: Provider) -> None:
    """Raise UsageError where ONNX Runtime took another provider than it was asked for."""
    chosen = session.get_providers()[0]
    if chosen != provider.name:
        raise UsageError(
            f"ONNX Runtime could not start {provider.name} and fell back to {chosen}; check the GPU's "
            "driver, CUDA and cuDNN libraries (docs/gpu.md), or use --runtime onnxruntime."
        )


def gpu_lost(message: str) -> bool:
    """-> whether ONNX Runtime's message names an error of CUDA after which the process can use the GPU no
    more."""
    found = re.search(r"CUDA (?:failure|error) (\d+)", message)
    return found is not None and int(found[1]) in gpu.STICKY.values()


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


def require_start(runtime: str) -> None:
    """Raise UsageError where `runtime` cannot compute here: onnxruntime-gpu also lists its providers on a
    machine without a GPU, so one is started."""
    provider = require_provider(runtime)
    if provider.device == "cpu":
        return
    _require_device(provider)
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = _opened(ort, SMALLEST, options, provider)
    except Exception as error:
        raise UsageError(
            f"ONNX Runtime {ort.__version__} cannot start {provider.name}: {_reason(error)}"
        ) from error
    _refuse_fallback(session, provider)


def _require_device(provider: Provider) -> None:
    """Raise UsageError, with the reason, where a provider's GPU is not there. ONNX Runtime would print lines
    of its own about it, and none that says what to do."""
    with contextlib.suppress(MissingPackage):
        if provider.device != "cpu":
            gpu.this_gpu()


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
