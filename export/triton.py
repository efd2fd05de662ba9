"""A bundle -> models of a Triton Inference Server repository: config.pbtxt, numbered versions, labels.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_repository.html
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ffl_deploy.bundle import DEFAULT_VARIANT, Bundle, Manifest, Variant
from ffl_deploy.files import replace_file, sha256_of, write_atomically

MAX_BATCH = 64
PREFERRED_BATCHES = (8, 32, 64)
QUEUE_DELAY_US = 1000  # how long Triton may hold an image back to fill a batch
VERSIONS_SERVED = 2  # the newest and the one before it, so that clients can go back


def write_repository(bundle: Bundle, folder: Path) -> list[Path]:
    """Add every variant that Triton can serve to the repository `folder`; -> the models' folders.

    A model that is there already gets a further version, unless its newest one has the same content.
    """
    backends = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt"}
    served = [variant for variant in bundle.manifest.variants if variant.runtime in backends]
    return [_write_model(bundle, variant, backends[variant.runtime], folder) for variant in served]


def _write_model(bundle: Bundle, variant: Variant, backend: str, folder: Path) -> Path:
    target = bundle.manifest.target
    model = folder / (target if variant.name == DEFAULT_VARIANT else f"{target}-{variant.name}")
    source, file = bundle.checked_file(variant.file), "model.plan" if backend == "tensorrt" else "model.onnx"
    versions = sorted((int(path.name) for path in model.glob("*") if path.name.isdecimal()), reverse=True)
    newest = model / str(versions[0] if versions else 1)
    if (newest / file).is_file() and sha256_of(newest / file) != variant.sha256:
        newest = model / str(versions[0] + 1)
    with open(source, "rb") as content, replace_file(newest / file) as copy:
        shutil.copyfileobj(content, copy)
    write_atomically(model / "labels.txt", "".join(f"{name}\n" for name in bundle.classes))
    # Last: Triton, polling its repository, loads a model when it has a configuration.
    write_atomically(model / "config.pbtxt", model_config(model.name, bundle.manifest, variant, backend))
    return model


def model_config(name: str, manifest: Manifest, variant: Variant, backend: str) -> str:
    """-> config.pbtxt. A dynamic graph is batched by Triton; a static one is served with its batch in the shape."""
    shape, fixed = manifest.input.preprocessing, manifest.input.batch
    largest = variant.details["engine"]["profile"]["max"] if "engine" in variant.details else MAX_BATCH
    batch = [] if fixed is None else [fixed]
    pixels = [*batch, shape.height, shape.width, 3]
    lines = [f'name: "{name}"', f'backend: "{backend}"', f"max_batch_size: {0 if fixed else largest}"]
    lines += ["input [", f"  {{ name: {_quoted(manifest.input.name)} data_type: TYPE_UINT8 dims: {pixels} }}", "]", "output ["]
    outputs = []
    for output in manifest.outputs:
        dims = [*batch, *(-1 if isinstance(size, str) else size for size in output.shape[1:])]
        labels = ' label_filename: "labels.txt"' if output.name == "probabilities" else ""
        outputs.append(f"  {{ name: {_quoted(output.name)} data_type: TYPE_FP32 dims: {dims}{labels} }}")
    lines += [",\n".join(outputs), "]", f"version_policy {{ latest {{ num_versions: {VERSIONS_SERVED} }} }}"]
    if fixed is None:
        preferred = [size for size in PREFERRED_BATCHES if size <= largest]
        lines += [
            "dynamic_batching {",
            f"  preferred_batch_size: {preferred}",
            f"  max_queue_delay_microseconds: {QUEUE_DELAY_US}",
            "}",
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
