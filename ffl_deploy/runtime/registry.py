"""Which runtimes there are, and how a bundle's variant is opened in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ffl_deploy.errors import UsageError, choices_sentence
from ffl_deploy.manifest import Manifest, Variant
from ffl_deploy.runtime.onnx_runtime import PROVIDERS, OnnxRuntimeSession
from ffl_deploy.runtime.onnx_wire import refuse_external_data
from ffl_deploy.runtime.session import FixedBatchSession, Session

Opener = Callable[[Path, "Variant", int | None], Session]


def _onnx_runtime(name: str) -> Opener:
    return lambda model, variant, threads: OnnxRuntimeSession(model, variant.name, threads, name)


def _openvino(model: Path, variant: Variant, threads: int | None) -> Session:
    from ffl_deploy.runtime.openvino_runtime import OpenVinoSession

    return OpenVinoSession(model, variant.name, threads, variant.precision.computed)


def _tensorrt(model: Path, variant: Variant, threads: int | None) -> Session:
    from ffl_deploy.runtime.tensorrt_runtime import TensorRtSession

    return TensorRtSession(model, variant)


RUNTIMES: dict[str, Opener] = {
    **{name: _onnx_runtime(name) for name in PROVIDERS},
    "openvino": _openvino,
    "tensorrt": _tensorrt,
}


class Files(Protocol):
    """What opening a variant asks of a bundle."""

    folder: Path
    manifest: Manifest

    def checked_file(self, name: str) -> Path:
        """-> path of a listed file whose content has the recorded hash. Raises CheckError."""
        ...


def open_session(bundle: Files, variant: Variant, runtime: str | None = None, threads: int | None = None) -> Session:
    """Open `variant` after checking its file's hash. `runtime` defaults to the one the variant was verified with.

    Raises CheckError (file changed, model refused), UsageError (unknown or missing runtime, a file it does not read).
    """
    name = runtime or variant.runtime
    if name not in RUNTIMES:
        raise UsageError(f"there is no runtime {name!r}. {choices_sentence(name, list(RUNTIMES))}")
    model = bundle.checked_file(variant.file)
    is_onnx = model.suffix == ".onnx"
    if is_onnx == (name == "tensorrt"):
        kind = "an ONNX file; TensorRT engines are separate variants" if is_onnx else "a TensorRT engine"
        raise UsageError(
            f"variant {variant.name} of {bundle.folder} is {kind}, which {name} does not read; give another --variant."
        )
    if is_onnx:
        refuse_external_data(model)
    session, fixed = RUNTIMES[name](model, variant, threads), bundle.manifest.input.batch
    return FixedBatchSession(session, fixed) if fixed else session
