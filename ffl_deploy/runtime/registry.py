"""Which runtimes there are, and how a bundle's variant is opened in one. A runtime is a row of RUNTIMES."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from ffl_deploy.errors import UsageError, choices_sentence
from ffl_deploy.installed import missing
from ffl_deploy.manifest import Manifest, Variant
from ffl_deploy.runtime.onnx_runtime import OnnxRuntimeSession, require_start
from ffl_deploy.runtime.onnx_wire import refuse_external_data
from ffl_deploy.runtime.operators import refuse_foreign_operators
from ffl_deploy.runtime.session import FixedBatchSession, Session

Opener = Callable[[Path, Variant, int | None], Session]
"""(model file, the variant that it is, threads or None for all cores) -> an open session."""


@dataclass(frozen=True)
class Runtime:
    """One way to execute a variant.

    reads: the suffixes of its files; extra: of ffl-deploy, which installs it; require: raises UsageError
    where it is not installed or cannot start, before any work is done; packages: the distributions whose
    versions its answers depend on; gpu: it computes on one; int8: it has int8 layers of its own; compiles:
    opening an ONNX file takes minutes the first time.
    """

    name: str
    reads: tuple[str, ...]
    extra: str
    open: Opener
    require: Callable[[], object]
    packages: tuple[str, ...]
    gpu: bool = False
    int8: bool = True
    compiles: bool = False

    @property
    def version(self) -> str:
        """-> of the first of `packages` that is installed; "" where none is."""
        from importlib.metadata import PackageNotFoundError, version

        for package in self.packages:
            with suppress(PackageNotFoundError):
                return version(package)
        return ""


def _onnx_runtime(model: Path, variant: Variant, threads: int | None) -> Session:
    return OnnxRuntimeSession(model, variant.name, threads)


def _onnx_runtime_cuda(model: Path, variant: Variant, threads: int | None) -> Session:
    return OnnxRuntimeSession(model, variant.name, threads, "onnxruntime-cuda")


def _openvino(model: Path, variant: Variant, threads: int | None) -> Session:
    from ffl_deploy.runtime.openvino_runtime import OpenVinoSession

    return OpenVinoSession(model, variant.name, threads, variant.precision.computed)


def _tensorrt(model: Path, variant: Variant, threads: int | None) -> Session:
    """An engine of the bundle; or, of an ONNX file, the one that is built for this GPU at first use."""
    from ffl_deploy.runtime.tensorrt_cache import bundled, engine_here
    from ffl_deploy.runtime.tensorrt_cascade import open_engine

    if model.suffix == ".engine":
        return open_engine(bundled(model, variant.engine), variant)
    if variant.exits:
        raise UsageError(NO_CASCADE)
    return open_engine(engine_here(model), variant)


NO_CASCADE = (
    "the two engines of a cascade are built by ffl-export --tensorrt, on the GPU that they are for; take the "
    "ONNX file with --runtime onnxruntime-cuda instead."
)


def _require_openvino() -> None:
    if importlib.util.find_spec("openvino") is None:
        raise missing(
            "openvino", "leave --runtime openvino and --precision bf16, which is verified on it, out"
        )


def _require_tensorrt() -> None:
    from ffl_deploy.runtime.gpu import this_gpu
    from ffl_deploy.runtime.tensorrt_modules import installed_flavour

    installed_flavour()
    this_gpu()


_ROWS = (
    Runtime(
        "onnxruntime",
        (".onnx",),
        "cpu",
        _onnx_runtime,
        partial(require_start, "onnxruntime"),
        ("onnxruntime", "onnxruntime-gpu"),
    ),
    # CUDA has no int8 convolution: a quantised file is computed in float there, and slower than the fp32 one.
    Runtime(
        "onnxruntime-cuda",
        (".onnx",),
        "gpu",
        _onnx_runtime_cuda,
        partial(require_start, "onnxruntime-cuda"),
        ("onnxruntime-gpu",),
        gpu=True,
        int8=False,
    ),
    Runtime("openvino", (".onnx",), "openvino", _openvino, _require_openvino, ("openvino",)),
    Runtime(
        "tensorrt",
        (".engine", ".onnx"),
        "tensorrt",
        _tensorrt,
        _require_tensorrt,
        ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu13"),
        gpu=True,
        compiles=True,
    ),
)
RUNTIMES = {runtime.name: runtime for runtime in _ROWS}
RETIRED = {
    "onnxruntime-tensorrt": (
        "ONNX Runtime's TensorRT provider is not used any more (it needs TensorRT 10 and computes fp32 "
        "files in TF32); use --runtime tensorrt, which builds an engine of the same file at first use"
    )
}
"""Runtimes of earlier versions -> what to use instead."""


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
    opened_by = runtime_named(runtime or variant.runtime)
    model = bundle.checked_file(variant.file)
    if model.suffix not in opened_by.reads:
        kind = "a TensorRT engine" if model.suffix == ".engine" else "an ONNX file"
        raise UsageError(
            f"variant {variant.name} of {bundle.folder} is {kind}, which {opened_by.name} does not read; "
            "give another --variant."
        )
    if model.suffix == ".onnx":
        refuse_external_data(model)
        refuse_foreign_operators(model)
    session, fixed = opened_by.open(model, variant, threads), bundle.manifest.input.batch
    return FixedBatchSession(session, fixed) if fixed else session


def require_gpu_runtime(name: str) -> None:
    """Raise UsageError where `name` computes on the processor, and a GPU was asked for."""
    if not runtime_named(name).gpu:
        on_gpu = " or ".join(f"--runtime {runtime.name}" for runtime in RUNTIMES.values() if runtime.gpu)
        raise UsageError(f"--gpu names a GPU, and {name} computes on the processor; add {on_gpu}.")


def computes_on_cpu(name: str) -> bool:
    """-> whether the processor decides what this runtime answers; False of one that is not known."""
    return name in RUNTIMES and not RUNTIMES[name].gpu


def runtime_named(name: str) -> Runtime:
    """-> its row of RUNTIMES. Raises UsageError where there is none."""
    if name in RETIRED:
        raise UsageError(f"{RETIRED[name]}.")
    if name not in RUNTIMES:
        raise UsageError(f"there is no runtime {name!r}. {choices_sentence(name, list(RUNTIMES))}")
    return RUNTIMES[name]
