"""Which runtimes there are, and how a bundle's variant is opened in one. A runtime is a row of RUNTIMES."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from ffl_deploy.errors import UsageError, choices_sentence
from ffl_deploy.installed import missing
from ffl_deploy.manifest import Manifest, Variant
from ffl_deploy.runtime.onnx_runtime import PROVIDERS, OnnxRuntimeSession, require_provider
from ffl_deploy.runtime.onnx_wire import refuse_external_data
from ffl_deploy.runtime.session import FixedBatchSession, Session

Opener = Callable[[Path, Variant, int | None], Session]
"""(model file, the variant that it is, threads or None for all cores) -> an open session."""


@dataclass(frozen=True)
class Runtime:
    """One way to execute a variant.

    reads: the suffix of its files; extra: of ffl-deploy, which installs it; require: raises UsageError where
    it is not installed or cannot start, before any work is done.
    """

    name: str
    reads: str
    extra: str
    open: Opener
    require: Callable[[], object]


def _onnx_runtime(name: str) -> Runtime:
    def opened(model: Path, variant: Variant, threads: int | None) -> Session:
        return OnnxRuntimeSession(model, variant.name, threads, name)

    return Runtime(
        name, ".onnx", "cpu" if name == "onnxruntime" else "gpu", opened, partial(require_provider, name)
    )


def _openvino(model: Path, variant: Variant, threads: int | None) -> Session:
    from ffl_deploy.runtime.openvino_runtime import OpenVinoSession

    return OpenVinoSession(model, variant.name, threads, variant.precision.computed)


def _tensorrt(model: Path, variant: Variant, threads: int | None) -> Session:
    from ffl_deploy.runtime.tensorrt_runtime import TensorRtSession

    return TensorRtSession(model, variant)


def _require_openvino() -> None:
    if importlib.util.find_spec("openvino") is None:
        raise missing(
            "openvino", "leave --runtime openvino and --precision bf16, which is verified on it, out"
        )


def _require_tensorrt() -> None:
    from ffl_deploy.runtime.tensorrt_runtime import EXTRAS

    if not any(importlib.util.find_spec(flavour) for flavour in EXTRAS):
        raise missing("tensorrt", "on GeForce and RTX take the extra tensorrt-rtx")


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        *(_onnx_runtime(name) for name in PROVIDERS),
        Runtime("openvino", ".onnx", "openvino", _openvino, _require_openvino),
        Runtime("tensorrt", ".engine", "tensorrt", _tensorrt, _require_tensorrt),
    )
}


class Files(Protocol):
    """What opening a variant asks of a bundle."""

    folder: Path
    manifest: Manifest

    def checked_file(self, name: str) -> Path:
        """-> path of a listed file whose content has the recorded hash. Raises CheckError."""
        ...


def open_session(
    bundle: Files, variant: Variant, runtime: str | None = None, threads: int | None = None
) -> Session:
    """Open `variant` after checking its file's hash.
    `runtime` defaults to the one the variant was verified with.

    Raises CheckError (file changed, model refused), UsageError (unknown or missing runtime,
    a file it does not read).
    """
    name = runtime or variant.runtime
    if name not in RUNTIMES:
        raise UsageError(f"there is no runtime {name!r}. {choices_sentence(name, list(RUNTIMES))}")
    model = bundle.checked_file(variant.file)
    opened_by = RUNTIMES[name]
    if model.suffix != opened_by.reads:
        kind = (
            "an ONNX file; TensorRT engines are separate variants"
            if model.suffix == ".onnx"
            else "a TensorRT engine"
        )
        raise UsageError(
            f"variant {variant.name} of {bundle.folder} is {kind}, which {name} does not read; give another "
            "--variant."
        )
    if model.suffix == ".onnx":
        refuse_external_data(model)
    session, fixed = opened_by.open(model, variant, threads), bundle.manifest.input.batch
    return FixedBatchSession(session, fixed) if fixed else session
