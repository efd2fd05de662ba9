"""A package that is missing, as a sentence: which extra brings it, and how this installation gets it."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ffl_deploy.errors import UsageError

PROJECT = "ffl-deploy"
SOURCE = Path(__file__).resolve().parent.parent
"""Where the packages lie: a clone, or site-packages."""


class Package(NamedTuple):
    """What people call a module, and the extra of ours that brings it ("" where it comes with the base)."""

    title: str
    extra: str


PACKAGES = {
    # the base, where somebody copied the folder instead of installing it
    "msgspec": Package("msgspec", ""),
    "numpy": Package("NumPy", ""),
    "PIL": Package("Pillow", ""),
    "tqdm": Package("tqdm", ""),
    # training and export
    "torch": Package("PyTorch", "train"),
    "torchvision": Package("torchvision", "train"),
    "timm": Package("timm", "train"),
    "safetensors": Package("safetensors", "train"),
    "scipy": Package("SciPy", "compare"),
    "tensorboard": Package("TensorBoard", "train"),
    "mlflow": Package("MLflow", "mlflow"),
    "wandb": Package("Weights & Biases", "wandb"),
    "onnx": Package("ONNX", "export"),
    "onnx_ir": Package("onnx-ir", "export"),
    "onnxscript": Package("ONNX Script", "export"),
    "google": Package("protobuf", "export"),
    # runtimes
    "onnxruntime": Package("ONNX Runtime", "cpu"),
    "openvino": Package("OpenVINO", "openvino"),
    "tensorrt": Package("TensorRT", "tensorrt"),
    "tensorrt_rtx": Package("TensorRT for RTX", "tensorrt-rtx"),
    "cuda": Package("cuda-bindings", "gpu"),
    # prediction and serving
    "pyarrow": Package("PyArrow (Parquet)", "predict"),
    "simplejpeg": Package("simplejpeg", "predict"),
    "matplotlib": Package("Matplotlib", "predict"),
    "pillow_heif": Package("pillow-heif", "heif"),
    "pillow_jxl": Package("pillow-jxl-plugin", "jxl"),
    "ray": Package("Ray", "ray"),
    "grpc": Package("gRPC", "grpc"),
    "opentelemetry": Package("OpenTelemetry's OTLP exporter", "otel"),
    "fsspec": Package("fsspec", "remote"),
    "s3fs": Package("s3fs", "remote"),
    "gcsfs": Package("gcsfs", "remote"),
    "aiohttp": Package("aiohttp", "remote"),
    "gradio": Package("Gradio", "serve"),
    "fastapi": Package("FastAPI", "serve"),
    "starlette": Package("Starlette", "serve"),
    "uvicorn": Package("uvicorn", "serve"),
    "httptools": Package("httptools", "serve"),
    "uvloop": Package("uvloop", "serve"),
    "prometheus_client": Package("prometheus-client", "serve"),
    "python_multipart": Package("python-multipart", "serve"),
    "model_signing": Package("OpenSSF model-signing", "signing"),
    "tritonclient": Package("Triton's client", "triton"),
}
"""Module -> the package that it belongs to. The one place that knows which extra brings what."""


class MissingPackage(UsageError):
    """A package that a command or flag needs is not installed."""


def missing(module: str, instead: str = "") -> MissingPackage:
    """-> the sentence about a module of PACKAGES that is not installed.

    instead: what else can be done, such as "leave --engine ray away".
    """
    package = PACKAGES[module]
    otherwise = f", or {instead}" if instead else ""
    return MissingPackage(
        f"{package.title} is not installed; run: {install_command(package.extra)}{otherwise}."
    )


def require(module: str, instead: str = "") -> None:
    """Raise MissingPackage where a module of PACKAGES, or one inside of it, is not installed; without
    importing it, so at once."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # nor what it would be inside of
        found = None
    if found is None:
        raise missing(module.partition(".")[0], instead)


def missing_import(error: ModuleNotFoundError) -> MissingPackage | None:
    """-> the sentence about an import that failed; None where no package of ours is the cause."""
    module = (error.name or "").partition(".")[0]
    return missing(module) if module in PACKAGES else None


def install_command(extra: str) -> str:
    """-> the command that adds an extra (or several, "predict,cpu") to this installation, however that was
    made: from a clone, a wheel, a Git address or an index."""
    origin, extras = _origin(), f"[{extra}]" if extra else ""
    return f"{_pip()} install {origin.flags}{shlex.quote(origin.requirement.format(extras=extras))}"


class _Origin(NamedTuple):
    flags: str
    requirement: str  # {extras} where they belong


def _origin() -> _Origin:
    """-> where this installation came from, by the record that pip leaves (PEP 610)."""
    # here, for the sake of every --help: they take longer to import than a parser takes to be built
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlsplit

    record: dict[str, Any] = {}
    try:
        record = json.loads(distribution(PROJECT).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # not installed at all: run from its folder
        return _Origin("-e ", f"{_folder(SOURCE)}{{extras}}")
    except ValueError:
        pass
    url = record.get("url", "")
    if vcs := record.get("vcs_info"):
        revision = vcs.get("requested_revision") or vcs.get("commit_id", "")
        return _Origin("", f"{PROJECT}{{extras}} @ {vcs['vcs']}+{url}{f'@{revision}' if revision else ''}")
    if not url.startswith("file:"):
        return _Origin("", f"{PROJECT}{{extras}} @ {url}" if url else f"{PROJECT}{{extras}}")
    path = Path(unquote(urlsplit(url).path))
    editable = record.get("dir_info", {}).get("editable", False)
    return _Origin("-e " if editable else "", f"{_folder(path)}{{extras}}")


def _folder(path: Path) -> str:
    """-> a path as pip takes it: relative where that is shorter, but never without a slash or a dot,
    which would be the name of a package."""
    with suppress(ValueError):
        relative = path.relative_to(Path.cwd())
        return "." if relative == Path() else f".{os.sep}{relative}"
    return str(path)


def _pip() -> str:
    """-> `pip` where that word is the one of this environment, else a path that is."""
    own = Path(sys.executable).parent
    found = shutil.which("pip")
    if found and Path(found).parent == own:
        return "pip"
    return f"{shlex.quote(sys.executable)} -m pip"
