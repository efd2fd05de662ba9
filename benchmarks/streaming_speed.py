"""How many photographs a second do the worker processes of training decode? A faster network waits for them.

    python -m benchmarks.streaming_speed --photos 640x480 4000x3000 --sizes 96 224 --workers 2

Draws JPEG files of each of these sizes (soft shapes and a camera's noise, quality 90) into a temporary
folder, and reads one epoch of them as training does: `crop` (the whole picture, resized as at deployment) and
`resized-crop` (a random part of the original). Prints a table; images/s are the median of --repeats epochs,
with the start of the worker processes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from ffl_deploy.command import Parser, run_command
from ffl_deploy.data.datasets import DataSpec, ImageData, load_data
from ffl_deploy.errors import DONE, UsageError
from ffl_deploy.markdown import table
from train.config import DataOptions
from train.data.batches import Plan, Shares
from train.data.streaming import StreamedBatches
from train.distributed import World

CLASSES, BATCH = 2, 16
VIEWS = {"crop": DataOptions(crop_padding=0), "resized-crop": DataOptions(augment="resized-crop")}


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    parser = Parser(
        prog="python -m benchmarks.streaming_speed", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--photos", nargs="+", default=["640x480", "4000x3000"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--sizes", nargs="+", type=int, default=[96, 224], help="pixels of the network")
    parser.add_argument("--count", type=int, default=256, help="photographs of each size")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for photo in arguments.photos:
        width, cross, height = photo.partition("x")
        if not (cross and width.isdecimal() and height.isdecimal()):
            raise UsageError(f"--photos {photo}: give width and height, as in 640x480.")
        with tempfile.TemporaryDirectory() as folder:
            size = draw(Path(folder), int(width), int(height), arguments.count)
            for side in arguments.sizes:
                data = load_data(DataSpec(source=folder, image_size=side), memory_limit=0)
                speeds = [
                    median(speed(data, view, arguments.workers) for _ in range(arguments.repeats))
                    for view in VIEWS.values()
                ]
                rows.append([photo, f"{size / 1000:.0f} kB", str(side), *(f"{one:.0f}" for one in speeds)])
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(["photographs", "a file", "pixels", *(f"{name}, images/s" for name in VIEWS)], rows))
    return DONE


def draw(folder: Path, width: int, height: int, count: int) -> float:
    """Write `count` photographs a training split and two a class for testing; -> mean bytes of a file."""
    draws, sizes = np.random.default_rng(0), []
    for part, number in (("train", count), ("test", 2 * CLASSES)):
        for index in range(number):
            target = folder / part / str(index % CLASSES) / f"{index}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            soft = Image.fromarray(draws.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            pixels = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC), np.float32)
            pixels += draws.standard_normal(pixels.shape, np.float32) * 4
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target, quality=90)
            sizes.append(target.stat().st_size)
    return float(np.mean(sizes))


def speed(data: ImageData, view: DataOptions, workers: int) -> float:
    """-> images/s of one epoch."""
    plan = Plan(view, BATCH, 0.0, 0, torch.device("cpu"), Shares(World(), 1))
    began = time.perf_counter()
    batches = StreamedBatches(data, plan, workers).training(0, 0)
    count = sum(len(one.labels) for pieces in batches for one in pieces)
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(run_command(main))
