"""How fast is ffl-predict? Against what its two halves allow, and against timm's inference.py.

    python benchmarks/predict_speed.py [--model resnet18] [--size 224] [--images 1000] [--rounds 3]
                                       [--timm PATH/inference.py] [--out FILE]

1. Bound: with D images/s decoded alone and I classified alone, each on all cores, one after the other cannot
   beat 1/(1/D + 1/I). D, I and the whole run E are measured in turn, `rounds` times; the median of E / bound
   is reported, by wall time and by processor time (all of the command's, start-up included), which hardly
   suffers from what else the machine does.
2. timm: its script and ffl-predict classify the same files with the same weights, also in turn. timm runs
   with the worker count and batch size that are best for it here, and is timed without its start-up by its
   own log.

JPEGs: seeded crops of scikit-learn's two sample photos, 640 x 480. Needs the extras `train`, `export`,
`predict` and `cpu`. timm's inference.py is not part of its wheel: give the path of the file in a checkout of
huggingface/pytorch-image-models.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ffl_deploy.bundle import Bundle, load_bundle, write_bundle
from ffl_deploy.bundle_files import GoldenSamples
from ffl_deploy.host import available_cores
from ffl_deploy.images import load
from ffl_deploy.manifest import InputTensor, OutputTensor, Precision, Source, Variant
from ffl_deploy.preprocessing import Preprocessing
from serve.inputs.items import file_item
from serve.pipeline import prepare_item

OPERATORS = ("Conv", "Gemm", "MatMul", "Add", "Relu", "MaxPool", "GlobalAveragePool", "ReduceMean")
GOLDEN = 8  # photos that a session answers as PyTorch does before it is used
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="resnet18", help="of timm, with random weights (speed does not depend on them)"
    )
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timm", type=Path, help="timm's inference.py")
    parser.add_argument("--out", type=Path, help="JSON with every measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photos(folder / "photos" / "all", arguments.images)
        weights = folder / "weights.safetensors"
        bundle = build_bundle(
            folder / "bundle",
            arguments.model,
            arguments.size,
            weights,
            sorted((folder / "photos").rglob("*.jpg")),
        )
        results: dict[str, Any] = {
            "model": arguments.model,
            "size": arguments.size,
            "images": arguments.images,
        }
        results["cores"] = available_cores()
        for variant in ("fp32", "int8"):
            results[variant] = against_bound(bundle, folder, variant, arguments.rounds)
        if arguments.timm:
            results["timm"] = against_timm(bundle, folder, arguments, weights)
    print(json.dumps(results, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def write_photos(folder: Path, count: int) -> None:
    """Seeded crops of two real photos, resized to 640 x 480,
    at the qualities that cameras and web sites use."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    originals = [Image.fromarray(image) for image in load_sample_images().images]
    folder.mkdir(parents=True)
    for index in range(count):
        image = originals[index % 2]
        width = int(rng.integers(320, image.width + 1))
        height = width * 3 // 4 if width * 3 // 4 <= image.height else image.height
        left, top = (
            int(rng.integers(0, image.width - width + 1)),
            int(rng.integers(0, image.height - height + 1)),
        )
        crop = image.crop((left, top, left + width, top + height)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        crop.save(folder / f"{index:05d}.jpg", quality=int(rng.integers(75, 96)))


def build_bundle(folder: Path, name: str, size: int, weights: Path, photos: list[Path]) -> Bundle:
    """-> a timm model as a bundle with the variants fp32 and int8; its weights go to `weights`, for timm."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    save_file(network.state_dict(), weights)
    folder.mkdir()
    preprocessing = Preprocessing(size, size, resize="crop", crop_fraction=0.95, filter="bicubic")
    golden = np.stack([load(photo, preprocessing) for photo in photos[:GOLDEN]])
    logits = write_fp32(network, folder / "model.onnx", golden)
    write_int8(folder / "model.onnx", folder / "model.int8.onnx", photos, preprocessing)
    write_bundle(
        folder,
        target="benchmark",
        classes=[str(i) for i in range(1000)],
        input=InputTensor(preprocessing),
        outputs=[OutputTensor("logits", ["batch", 1000]), OutputTensor("probabilities", ["batch", 1000])],
        source=Source(
            run="benchmark",
            checkpoint="last",
            checkpoint_sha256="0" * 64,
            epoch=0,
            method="none",
            branches=[name],
            data="none",
            parameters=sum(p.numel() for p in network.parameters()),
        ),
        variants=[
            Variant.of_file(folder, folder / file, variant, "onnxruntime", Precision(variant, variant))
            for variant, file in (("fp32", "model.onnx"), ("int8", "model.int8.onnx"))
        ],
        golden=GoldenSamples(golden, np.full(len(golden), -1), logits),
        origin="the photos",
        toolchain={"torch": str(torch.__version__)},
        card=lambda manifest: f"# {manifest.source.branches[0]} for measuring\n",
    )
    return load_bundle(folder)


def write_fp32(network: Any, path: Path, images: np.ndarray) -> np.ndarray:
    """Write the network behind its normalisation; -> its logits on `images`, uint8 [n, height, width, 3]."""
    import torch

    class Deployed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255)
            self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) * 255)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.network((images.permute(0, 3, 1, 2).float() - self.mean) / self.std)
            return logits, logits.softmax(1)

    deployed, example = Deployed().eval(), torch.from_numpy(images)
    torch.onnx.export(
        deployed,
        (example,),
        path,
        dynamo=True,
        external_data=False,
        input_names=["images"],
        output_names=["logits", "probabilities"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    with torch.inference_mode():
        return deployed(example)[0].numpy()


def write_int8(source: Path, path: Path, photos: list[Path], preprocessing: Preprocessing) -> None:
    """Quantise `source` on 64 photos (U8S8, what ONNX Runtime's CPU is fast with)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Photos(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(photos[:64])

        def get_next(self) -> dict[str, np.ndarray] | None:
            for photo in self.rest:
                pixels = prepare_item(file_item(str(photo)), preprocessing).pixels
                if pixels is not None:
                    return {"images": pixels[None]}
            return None

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        path,
        Photos(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(OPERATORS),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    prepared.unlink()


@dataclass(frozen=True)
class Rate:
    """Images per second of wall time and of processor time;
    the second hardly suffers from what else the machine does."""

    wall: float
    processor: float

    @classmethod
    def of(cls, images: int, work: Callable[[], object]) -> Rate:
        """-> the rate at which `work` handles `images`, in this process."""
        wall, processor = time.perf_counter(), time.process_time()
        work()
        return cls(images / (time.perf_counter() - wall), images / (time.process_time() - processor))


def against_bound(bundle: Bundle, folder: Path, variant: str, rounds: int) -> dict[str, Any]:
    """-> D, I, E and the medians of E / (1/(1/D + 1/I)), by wall and by processor time;
    each round measured in turn."""
    photos = sorted((folder / "photos").rglob("*.jpg"))
    measured = []
    for _ in range(rounds):
        summary = predict(bundle, folder, variant)
        decode, infer = decode_rate(photos, bundle), infer_rate(bundle, variant, summary["settings"])
        whole = Rate(summary["images_per_second"], len(photos) / summary["processor_seconds"])
        row: dict[str, Any] = {"settings": summary["settings"]}
        for kind in ("wall", "processor"):
            d, i, e = (getattr(rate, kind) for rate in (decode, infer, whole))
            row[kind] = {
                "decode": d,
                "infer": i,
                "whole": e,
                "bound": 1 / (1 / d + 1 / i),
                "share": e * (1 / d + 1 / i),
            }
        print(
            variant,
            {kind: {k: round(v, 2) for k, v in row[kind].items()} for kind in ("wall", "processor")},
            file=sys.stderr,
        )
        measured.append(row)
    medians = {
        kind: statistics.median(row[kind]["share"] for row in measured) for kind in ("wall", "processor")
    }
    return {"median_share_of_bound": medians, "rounds": measured}


def decode_rate(photos: list[Path], bundle: Bundle) -> Rate:
    """-> images/s read, decoded and resized by one thread for each core, nothing else running."""

    def prepare(path: Path) -> None:
        prepare_item(file_item(str(path)), bundle.preprocessing)

    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(prepare, photos[:50]))
        return Rate.of(len(photos), lambda: list(pool.map(prepare, photos)))


def infer_rate(bundle: Bundle, variant: str, settings: dict[str, int], batches: int = 8) -> Rate:
    """-> images/s of the bare session in the configuration that the run chose: `streams` callers,
    batch after batch."""
    session = bundle.session(variant, threads=settings["threads"])
    size = bundle.preprocessing
    shape = (settings["batch_size"], size.height, size.width, 3)
    batch = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    calls = batches * settings["streams"]
    with ThreadPoolExecutor(settings["streams"]) as pool:
        list(pool.map(session.run, [batch] * settings["streams"]))
        return Rate.of(calls * len(batch), lambda: list(pool.map(session.run, [batch] * calls)))


def timed(command: Sequence[object]) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """-> what the command said, and its wall and processor seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def predict(bundle: Bundle, folder: Path, variant: str) -> dict[str, Any]:
    """-> the closing summary of one ffl-predict, with the wall and processor seconds of the whole command."""
    command = [sys.executable, "-m", "serve.predict", bundle.folder, folder / "photos", "--json"]
    done, seconds, processor = timed([*command, "--variant", variant, "--out", folder / f"{variant}.parquet"])
    return json.loads(done.stdout) | {"wall_seconds": seconds, "processor_seconds": processor}


def timm_rate(
    arguments: argparse.Namespace, folder: Path, weights: Path, workers: int, batch: int
) -> tuple[float, float, float]:
    """-> (images/s of its loop, wall and processor seconds of the whole command)."""
    command = [sys.executable, arguments.timm, folder / "photos"]
    command += ["--model", arguments.model, "--checkpoint", weights, "--img-size", arguments.size]
    command += ["--device", "cpu", "-j", workers, "-b", batch, "--results-file", folder / "timm.csv"]
    command += ["--crop-pct", "0.95", "--interpolation", "bicubic", "--topk", "5"]
    command += ["--label-type", "name", "--exclude-output"]
    done, seconds, processor = timed([*command, "--no-console-results", "--log-freq", "1"])
    averages = re.findall(r"Time [\d.]+ \(([\d.]+)\)", done.stdout + done.stderr)
    batches = -(-arguments.images // batch)
    assert len(averages) == batches, done.stderr
    return arguments.images / (float(averages[-1]) * batches), seconds, processor


def against_timm(
    bundle: Bundle, folder: Path, arguments: argparse.Namespace, weights: Path
) -> dict[str, Any]:
    """-> images/s of timm's script (its best configuration) and of ffl-predict, in turn, and the ratios'
    medians."""
    # timm's best configuration here
    tried = {
        (workers, batch): timm_rate(arguments, folder, weights, workers, batch)[0]
        for workers in (1, 2)
        for batch in (16, 64)
    }
    best = max(tried, key=lambda key: tried[key])

    # in turn
    rounds = []
    for _ in range(arguments.rounds):
        rate, seconds, processor = timm_rate(arguments, folder, weights, *best)
        row: dict[str, Any] = {"timm": {"images_per_second": rate, "wall": seconds, "processor": processor}}
        for variant in ("fp32", "int8"):
            summary = predict(bundle, folder, variant)
            row[variant] = {
                "images_per_second": summary["images_per_second"],
                "wall": summary["wall_seconds"],
                "processor": summary["processor_seconds"],
            }
        print({k: {n: round(x, 2) for n, x in v.items()} for k, v in row.items()}, file=sys.stderr)
        rounds.append(row)
    configurations = {f"{workers} workers, batch {batch}": rate for (workers, batch), rate in tried.items()}
    return {
        "configurations": configurations,
        "ratios": {v: ratios(rounds, v) for v in ("fp32", "int8")},
        "rounds": rounds,
    }


def ratios(rounds: list[dict[str, Any]], variant: str) -> dict[str, float]:
    """-> medians over the rounds of how many times faster than timm: its loop, the whole command,
    processor time."""
    return {
        "loop": statistics.median(
            row[variant]["images_per_second"] / row["timm"]["images_per_second"] for row in rounds
        ),
        "wall": statistics.median(row["timm"]["wall"] / row[variant]["wall"] for row in rounds),
        "processor": statistics.median(
            row["timm"]["processor"] / row[variant]["processor"] for row in rounds
        ),
    }


if __name__ == "__main__":
    main()
