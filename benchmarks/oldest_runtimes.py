"""The oldest ONNX Runtime, OpenVINO and TensorRT-RTX that run each operator set and form: installs them,
and runs them.

    python -m benchmarks.oldest_runtimes --run runs/digits

Every file is exported from the run, at every opset. Each version of a runtime gets an environment of its own
from PyPI (with an older Python where that is what it has wheels for), runs every file on the golden samples,
and is held to the file's gate. A version is "read" when it loads the file, and "right" when its logits hold.
TensorRT's own wheels need a GPU to build an engine (`tensorrt`); TensorRT-RTX builds without one, and parses
with the same parser.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.cli import main as export_main
from export.write.onnx_graph import OPSETS
from ffl_deploy import markdown
from ffl_deploy.bundle import load_bundle
from ffl_deploy.parity import PARITY_GATES, compare, judge

VERSIONS = {
    "onnxruntime": [
        "1.15.1",
        "1.16.3",
        "1.17.3",
        "1.18.1",
        "1.19.2",
        "1.20.1",
        "1.21.1",
        "1.22.1",
        "1.23.2",
        "1.24.4",
        "1.32.0",
    ],
    "openvino": ["2023.3.0", "2024.0.0", "2024.6.0", "2025.0.0", "2025.4.1", "2026.4.1"],
    "tensorrt-rtx": ["1.4.0.76", "1.7.1.116"],
}
REQUIRES = {"onnxruntime": ["numpy<2"], "openvino": ["numpy<2"], "tensorrt-rtx": ["numpy"]}
FORMS = {
    "fp32": "model.onnx",
    "fp16": "model.fp16.onnx",
    "bf16": "model.bf16.onnx",
    "int8": "model.int8.onnx",
}
FORMS["int8-tensorrt"] = "model.int8-tensorrt.onnx"

# Runs inside each environment, which has nothing of ours: file and images in, logits out.
PROBE = {
    "onnxruntime": """
import sys, numpy, onnxruntime as ort
ort.set_default_logger_severity(4)
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(["logits"], {"images": numpy.load(sys.argv[2])})[0])
""",
    "openvino": """
import sys, numpy, openvino
core = openvino.Core() if hasattr(openvino, "Core") else __import__("openvino.runtime").runtime.Core()
model = core.compile_model(core.read_model(sys.argv[1]), "CPU", {"INFERENCE_PRECISION_HINT": sys.argv[4]})
outputs = model({"images": numpy.load(sys.argv[2])})
(logits,) = [value for port, value in outputs.items() if "logits" in port.get_names()]
numpy.save(sys.argv[3], logits)
""",
    "tensorrt-rtx": """
import sys, tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(sys.argv[1]):
    raise SystemExit(str(parser.get_error(0).desc()))
config = builder.create_builder_config()
profile, shape = builder.create_optimization_profile(), [int(one) for one in sys.argv[5].split("x")]
profile.set_shape("images", (1, *shape), (8, *shape), (64, *shape))
config.add_optimization_profile(profile)
config.num_compute_capabilities = 1  # of no GPU here: an engine for one kind of them
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
if builder.build_serialized_network(network, config) is None:
    raise SystemExit("no engine")
""",
}


def environment(root: Path, package: str, version: str) -> Path | str:
    """-> Python of an environment that has this version, or why there is none."""
    folder = root / f"{package}-{version}"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.is_file():
        venv.create(folder, with_pip=True, clear=True)
        command = [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            f"{package}=={version}",
            *REQUIRES[package],
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return last_line(done.stderr)
        ready.touch()
    return python


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


def export_all(run: str, target: str, opsets: Sequence[int], out: Path) -> None:
    for opset in opsets:
        if not (out / str(opset) / target / "bundle.json").is_file():
            flags = [run, "--target", target, "--opset", str(opset), "--out", str(out / str(opset))]
            for precision in ("fp16", "bf16", "int8"):
                flags += ["--precision", precision]
            if export_main(flags):
                raise SystemExit(f"opset {opset} could not be exported")


def probe(package: str, python: Path, path: Path, form: str, bundle: Path, scratch: Path) -> str:
    """-> "right", "read" (its logits do not hold, with the finding), or why it was not run."""
    golden = load_bundle(bundle).golden()
    images, found = scratch / "images.npy", scratch / "logits.npy"
    np.save(images, golden.images)
    found.unlink(missing_ok=True)
    hint = "bf16" if form == "bf16" else "f32"
    shape = "x".join(str(one) for one in golden.images.shape[1:])
    command = [python, "-c", PROBE[package], path, images, found, hint, shape]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return last_line(done.stderr)
    if package == "tensorrt-rtx":
        return "read"  # an engine was built; running it takes a GPU
    metrics = compare(golden.logits, np.load(found).astype(np.float32))
    verdict = judge({str(metrics.n): metrics}, PARITY_GATES[form.partition("-")[0]])
    return f"read, but {verdict.findings[0]}" if verdict.failed else "right"


def table(results: dict[str, dict[str, dict[str, str]]]) -> str:
    """results: package -> version -> "opset form" -> outcome; -> Markdown,
    the oldest version for each opset and form."""
    packages = list(results)
    rows = []
    keys = dict.fromkeys(
        key for versions in results.values() for outcomes in versions.values() for key in outcomes
    )
    for key in keys:
        cells = []
        for package in packages:
            good = [
                version
                for version, outcomes in results[package].items()
                if outcomes.get(key) in ("right", "read")
            ]
            cells.append(min(good, key=release) if good else "none")
        rows.append([*key.split(), *cells])
    return markdown.table(["opset", "form", *packages], rows)


def release(version: str) -> tuple[int, ...]:
    """-> a version, so that versions sort as they were released: 1.9.0 before 1.10.0."""
    return tuple(int(part) for part in version.split("."))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--run", default="runs/digits", help="a finished run, which every file is exported from"
    )
    parser.add_argument("--target", default="branch0")
    parser.add_argument("--opsets", type=int, nargs="+", default=list(OPSETS))
    parser.add_argument("--packages", nargs="+", default=list(VERSIONS), choices=list(VERSIONS))
    parser.add_argument("--versions", nargs="+", help="instead of those of the list (with one package)")
    parser.add_argument(
        "--work", type=Path, default=Path("oldest_runtimes"), help="environments, bundles and results.json"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    export_all(arguments.run, arguments.target, arguments.opsets, arguments.work / "bundles")
    stored = arguments.work / "results.json"
    results = json.loads(stored.read_text()) if stored.is_file() else {}
    for package in arguments.packages:
        outcomes = results.setdefault(package, {})
        for version in arguments.versions or VERSIONS[package]:
            python = environment(arguments.work / "environments", package, version)
            if isinstance(python, str):
                print(f"{package} {version}: cannot be installed here: {python}", flush=True)
                continue
            of_version = outcomes.setdefault(version, {})
            for opset in arguments.opsets:
                bundle = arguments.work / "bundles" / str(opset) / arguments.target
                for form, name in FORMS.items():
                    outcome = probe(package, python, bundle / name, form, bundle, arguments.work)
                    of_version[f"{opset} {form}"] = outcome
                    print(f"{package} {version}, opset {opset}, {form}: {outcome}", flush=True)
            stored.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    sys.exit(main())
