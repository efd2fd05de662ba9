"""A bundle's int8 file against its own fp32 file, on test images, through one runtime after the other.

    python -m benchmarks.int8_agreement BUNDLE --data CIFAR100/test --runtimes onnxruntime,openvino
    python -m benchmarks.int8_agreement BUNDLE --data CIFAR100/test --images 500 --runtimes reference
    qemu-x86_64 -cpu Haswell .venv/bin/python -m benchmarks.int8_agreement BUNDLE --data CIFAR100/test \\
        --images 500 --threads 1

`reference` is onnx.reference: exact integer sums, which is what processors with VNNI compute. Images are
taken class by class in turn. Each line: mean KL from the fp32 file's distribution, top-1 agreement with it,
accuracy of both, and the paired difference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.command import Parser, run_command
from ffl_deploy.errors import UsageError
from ffl_deploy.images import load
from ffl_deploy.parity import compare
from ffl_deploy.preprocessing import Preprocessing
from ffl_deploy.runtime import open_session
from ffl_deploy.statistics import paired_difference

Run = Callable[[np.ndarray], np.ndarray]
BATCH = 50


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    parser = Parser(prog="python -m benchmarks.int8_agreement", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of CLASS/* test images")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument(
        "--runtimes", default="onnxruntime", help="of onnxruntime, openvino, reference; with commas"
    )
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args(argv)
    bundle = load_bundle(arguments.bundle)
    images, labels = read(arguments.data, list(bundle.classes), arguments.images, bundle.preprocessing)
    exact = in_batches(runner(bundle, "fp32", "onnxruntime", arguments.threads), images)
    for name in arguments.runtimes.split(","):
        logits = in_batches(runner(bundle, arguments.variant, name, arguments.threads), images)
        metrics = compare(exact, logits)
        difference = paired_difference(exact.argmax(axis=1) == labels, logits.argmax(axis=1) == labels)
        low, high = 100 * difference.interval.low, 100 * difference.interval.high
        print(
            f"{arguments.bundle} {arguments.variant} {name}: {len(images)} images, mean KL "
            f"{metrics.mean_kl:.5f}, agreement "
            f"{100 * np.mean(exact.argmax(axis=1) == logits.argmax(axis=1)):.2f} %, accuracy "
            f"{100 * difference.candidate_accuracy:.2f} % (fp32 {100 * difference.reference_accuracy:.2f} %, "
            f"{100 * difference.delta:+.2f} [{low:+.2f}, {high:+.2f}])",
            flush=True,
        )
    return 0


def read(
    folder: Path, classes: list[str], limit: int, preprocessing: Preprocessing
) -> tuple[np.ndarray, np.ndarray]:
    """-> (uint8 [n, h, w, 3], labels int64 [n]): the first images of every class, then the second ones, ...
    Raises UsageError."""
    found = [sorted((folder / name).glob("*")) for name in classes]
    if not all(found):
        raise UsageError(f"{folder} has no folder with images for every class of the bundle.")
    rows = [(path, label) for label, paths in enumerate(found) for path in paths]
    rank = {path: place for paths in found for place, path in enumerate(paths)}
    rows = sorted(rows, key=lambda row: (rank[row[0]], row[1]))[:limit]
    pixels = np.stack([load(path, preprocessing) for path, _ in rows])
    return pixels, np.array([label for _, label in rows])


def runner(bundle: Bundle, variant: str, runtime: str, threads: int | None) -> Run:
    """-> uint8 images -> float32 logits."""
    if runtime == "reference":
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(str(bundle.folder / bundle.variant(variant).file))
        return lambda images: evaluator.run(["logits"], {"images": images})[0]
    session = open_session(bundle, bundle.variant(variant), runtime, threads)
    return lambda images: session.run(images).logits


def in_batches(run: Run, images: np.ndarray) -> np.ndarray:
    return np.concatenate([run(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])


if __name__ == "__main__":
    sys.exit(run_command(main))
