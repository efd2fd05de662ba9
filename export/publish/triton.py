"""A bundle -> models of a Triton Inference Server repository: config.pbtxt, numbered versions, labels.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_repository.html
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ffl_deploy.bundle import Bundle
from ffl_deploy.command import printable
from ffl_deploy.errors import UsageError
from ffl_deploy.files import replace_file, sha256_of, write_atomically
from ffl_deploy.manifest import DEFAULT_VARIANT, Manifest, Variant

CONFIG = "config.pbtxt"
MARK = "# Written by ffl-export, which replaces it at the next export."
RUN = "# run: "
PRECISION_FORMS = ("fp32", "fp16", "bf16", "int8", "int8-tensorrt")
FORMS = (*PRECISION_FORMS, *(f"{name}-engine" for name in PRECISION_FORMS))
"""What a variant's name adds to its model's: `fused-int8` is one of `fused`, `fused-large` is not."""
MAX_BATCH = 64
PREFERRED_BATCHES = (8, 32, 64)
QUEUE_DELAY_US = 1000  # how long Triton may hold an image back to fill a batch
VERSIONS_SERVED = 2  # the newest and the one before it, so that clients can go back


def write_repository(bundle: Bundle, folder: Path, name: str | None = None) -> list[Path]:
    """Add every variant that Triton can serve (see `backend_of`) to the repository `folder`; -> the models'
    folders. name: of the fp32 model; the target's if not given.

    A model that is there already gets a further version, unless its newest one has the same content. Raises
    UsageError where a model of the same name was not written here, or is another run's.
    """
    name = name or bundle.manifest.target
    require_own_models(folder, [name], bundle.manifest.source.run)
    served = [(variant, backend_of(variant)) for variant in bundle.manifest.variants]
    return [_write_model(bundle, variant, backend, folder, name) for variant, backend in served if backend]


def model_names(targets: Sequence[str], name: str | None) -> dict[str, str]:
    """-> target -> the name of its fp32 model: its own, or, with --name, that one; NAME-TARGET of several.
    Raises UsageError for a name that no client could ask for."""
    if name is None:
        return {target: target for target in targets}
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UsageError(
            f"--name {name}: a model is called by letters, digits, dots, dashes and underscores."
        )
    return {target: name if len(targets) == 1 else f"{name}-{target}" for target in targets}


def require_own_models(folder: Path, names: Sequence[str], run: str) -> None:
    """Raise UsageError where `folder` holds a model whose name an export of `run` may take, and that was not
    written here or is another run's: Triton would serve this run's as its new version."""
    for name in names:
        for model in sorted(folder.glob(f"{glob.escape(name)}*")):
            config = model / CONFIG
            if model.name != name and model.name.removeprefix(f"{name}-") not in FORMS:
                continue
            written = config.read_text(errors="replace").splitlines()[:2] if config.is_file() else []
            if written[:1] != [MARK]:
                raise UsageError(
                    f"--triton: {model} is a model that was not written here; move it away, or give another "
                    "folder."
                )
            if written[1:] and written[1].startswith(RUN) and written[1] != _run_line(run):
                raise UsageError(
                    f"--triton: {model} is of the run {written[1].removeprefix(RUN)}; give this run's models "
                    f"a name of their own with --name, for example --name {run}."
                )


def _run_line(run: str) -> str:
    return RUN + printable(run)


def backend_of(variant: Variant) -> str | None:
    """-> Triton's backend for a variant, None where it has none: OpenVINO variants are ONNX files that are
    served already, or bf16, which ONNX Runtime does not compute; TensorRT-RTX's engines are for GeForce and
    RTX, and no backend loads them."""
    if variant.runtime == "onnxruntime":
        return "onnxruntime"
    is_tensorrt = variant.runtime == "tensorrt" and variant.engine.flavour == "tensorrt" and not variant.exits
    return "tensorrt" if is_tensorrt else None


def _write_model(bundle: Bundle, variant: Variant, backend: str, folder: Path, name: str) -> Path:
    model = folder / (name if variant.name == DEFAULT_VARIANT else f"{name}-{variant.name}")
    source, file = bundle.checked_file(variant.file), "model.plan" if backend == "tensorrt" else "model.onnx"
    versions = sorted((int(path.name) for path in model.glob("*") if path.name.isdecimal()), reverse=True)
    newest = model / str(versions[0] if versions else 1)
    if (newest / file).is_file() and sha256_of(newest / file) != variant.sha256:
        newest = model / str(versions[0] + 1)
    config, path = model_config(model.name, bundle.manifest, variant, backend), model / CONFIG
    names, labels = "".join(f"{name}\n" for name in bundle.classes), model / "labels.txt"
    if path.is_file() and (_signature(path.read_text()), labels.read_text()) != (_signature(config), names):
        # inputs, outputs or classes are not these: one configuration cannot serve both
        for version in versions:
            if newest.name != str(version):
                shutil.rmtree(model / str(version))
    with open(source, "rb") as content, replace_file(newest / file) as copy:
        shutil.copyfileobj(content, copy)
    write_atomically(labels, names)
    # Last: Triton, polling its repository, loads a model when it has a configuration.
    write_atomically(path, config)
    return model


def model_config(name: str, manifest: Manifest, variant: Variant, backend: str) -> str:
    """-> config.pbtxt. A dynamic graph is batched by Triton;
    a static one is served with its batch in the shape."""
    shape, fixed = manifest.input.preprocessing, manifest.input.batch
    engine = variant.details.engine
    largest = engine.profile["max"] if engine else MAX_BATCH
    batch = [] if fixed is None else [fixed]
    pixels = [*batch, shape.height, shape.width, 3]
    lines = [
        MARK,
        _run_line(manifest.source.run),
        f'name: "{name}"',
        f'backend: "{backend}"',
        f"max_batch_size: {0 if fixed else largest}",
    ]
    lines += [
        "input [",
        f"  {{ name: {_quoted(manifest.input.name)} data_type: TYPE_UINT8 dims: {pixels} }}",
        "]",
        "output [",
    ]
    outputs = []
    for output in manifest.outputs:
        dims = [*batch, *(-1 if isinstance(size, str) else size for size in output.shape[1:])]
        labels = ' label_filename: "labels.txt"' if output.name == "probabilities" else ""
        outputs.append(f"  {{ name: {_quoted(output.name)} data_type: TYPE_FP32 dims: {dims}{labels} }}")
    lines += [",\n".join(outputs), "]", f"version_policy {{ latest {{ num_versions: {VERSIONS_SERVED} }} }}"]
    if engine and len(engine.profiles) > 1:
        # by itself Triton takes the first one, which is for a lone image
        profiles = ", ".join(_quoted(str(index)) for index in range(len(engine.profiles)))
        lines.append(f"instance_group [ {{ kind: KIND_GPU profile: [{profiles}] }} ]")
    if fixed is None:
        preferred = [size for size in PREFERRED_BATCHES if size <= largest]
        lines += [
            "dynamic_batching {",
            f"  preferred_batch_size: {preferred}",
            f"  max_queue_delay_microseconds: {QUEUE_DELAY_US}",
            "}",
        ]
    return "\n".join(lines) + "\n"


def _signature(config: str) -> str:
    """-> what a configuration says of inputs and outputs."""
    return config[config.find("input [") : config.find("version_policy")]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
