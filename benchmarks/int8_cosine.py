"""The int8 files of bundles against their fp32 file, block by block:
what the gates of ffl_deploy/parity.py were set by.

    python -m benchmarks.int8_cosine --images DIR BUNDLE [BUNDLE ...]

Blocks of 256 images of DIR, evenly spread; the least cosine of all images and of those whose logits have a
direction, mean KL and top-1 agreement. Then the same files damaged: a tenth of one convolution's weights
lost, and all weights cut to five bits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from ffl_deploy.bundle import load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.errors import UsageError
from ffl_deploy.images import load
from ffl_deploy.parity import compare
from ffl_deploy.runtime import OnnxRuntimeSession
from ffl_deploy.runtime.replay import run_in_batches

BLOCK, BLOCKS = 256, 4


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    return run_in_batches(OnnxRuntimeSession(path, path.stem).run, images.__getitem__, len(images), 64).logits


def row(name: str, reference: np.ndarray, found: np.ndarray) -> str:
    metrics = compare(reference, found)
    every = min(
        compare(one[None], other[None]).cosine_min for one, other in zip(reference, found, strict=True)
    )
    return (
        f"| {name} | {every:.4f} | {metrics.cosine_min:.4f} | {metrics.mean_kl:.5f} | "
        f"{100 * metrics.top1_agreement:.1f} % |"
    )


def write_damaged(source: Path, target: Path, kind: str) -> None:
    """kind: "weights lost" (a tenth of the middle convolution's) or "five bits" (all weights)."""
    model = onnx.load(source)
    tensors = [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    ]
    for tensor in tensors if kind == "five bits" else tensors[len(tensors) // 2 :][:1]:
        values = numpy_helper.to_array(tensor)
        lost = np.random.default_rng(0).random(values.shape) < 0.1
        damaged = values >> 3 << 3 if kind == "five bits" else np.where(lost, np.int8(0), values)
        tensor.CopyFrom(numpy_helper.from_array(damaged, tensor.name))
    onnx.save(model, target)


def main(argv: list[str]) -> int:
    """-> exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="with int8 files")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="images that the models have not seen"
    )
    arguments = parser.parse_args(argv)
    files = sorted(path for path in arguments.images.rglob("*") if path.is_file())
    blocks = min(BLOCKS, len(files) // BLOCK)
    if not blocks:
        raise UsageError(f"{arguments.images} holds {len(files)} images; give a folder with {BLOCK} or more.")
    chosen = [files[index] for index in np.linspace(0, len(files) - 1, blocks * BLOCK).round().astype(int)]
    print(
        "| file | least cosine, all | with a direction | mean KL | top-1 agreement |\n|---|---|---|---|---|"
    )
    for folder in arguments.bundles:
        bundle = load_bundle(folder)
        images = np.stack([load(path, bundle.preprocessing) for path in chosen])
        reference = logits(folder / "model.onnx", images)
        for path in sorted(folder.glob("model.int8*.onnx")):
            found, name = logits(path, images), f"{folder}/{path.name}"
            for start in range(0, len(images), BLOCK):
                rows = slice(start, start + BLOCK)
                print(
                    row(f"{name}, {start} to {start + BLOCK - 1}", reference[rows], found[rows]), flush=True
                )
            for kind in ("weights lost", "five bits"):
                with tempfile.TemporaryDirectory() as temporary:
                    damaged = Path(temporary) / path.name
                    write_damaged(path, damaged, kind)
                    print(
                        row(f"{name}, {kind}", reference[:BLOCK], logits(damaged, images[:BLOCK])), flush=True
                    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
