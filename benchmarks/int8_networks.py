"""int8 by calibration alone on other kinds of networks: squeeze-excite, SiLU, layer normalisation, attention.

    python -m benchmarks.int8_networks --data CIFAR100 --cpu-minutes 10

One network at a time is trained by `ffl-train --method vanilla` for a few epochs on ten classes of CIFAR-100,
enlarged to 64 pixels, exported by `ffl-export --precision int8`, and its int8 file compared with its own fp32
file on all test images of these classes (1,000). ONNX Runtime computes them: the file's certificate says that
its sums are exact on every processor. What is finished is kept in --work and not done again; a training that
has used up its processor time is saved, and the next call goes on. Prints a table; exit code 1 where export
refused a network's int8 file (the others are measured all the same).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from benchmarks.int8_agreement import in_batches, read, runner
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.command import Parser, run_command
from ffl_deploy.errors import DONE, INTERRUPTED, CheckError, UsageError
from ffl_deploy.files import write_atomically
from ffl_deploy.manifest import Details
from ffl_deploy.markdown import percent, table
from ffl_deploy.parity import compare
from ffl_deploy.run_directory import SUMMARY

NETWORKS = (
    "efficientnet_b0", "mobilenetv3_small_050", "efficientnet_lite0", "mobilevit_xxs", "convnext_atto",
)  # fmt: skip
CLASSES = (
    "apple", "bicycle", "castle", "keyboard", "leopard",
    "plain", "rocket", "sunflower", "telephone", "wardrobe",
)  # fmt: skip
TRAINING = (
    "--method", "vanilla", "--image-size", "64", "--small-size", "32", "--small-share", "0.65",
    "--optimizer", "adamw", "--lr", "0.003", "--weight-decay", "0.02", "--clip", "2",
    "--schedule", "onecycle", "--batch-size", "32", "--crop-padding", "6", "--flip",
    "--precision", "fp32", "--threads", "1",
)  # fmt: skip
TICK = 2.0  # seconds between two looks at a training's processor time


@dataclass(frozen=True)
class Row:
    """One network: its int8 file against its own fp32 file, shares of 1."""

    network: str
    images: int
    accuracy: float  # fp32
    int8_accuracy: float
    agreement: float
    mean_kl: float
    method: str
    convolutions: int
    float_convolutions: list[str]


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    parser = Parser(prog="python -m benchmarks.int8_networks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="CIFAR-100 as train/CLASS/* and test/CLASS/*"
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), metavar="NAME", help="of timm")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path("int8_networks"), help="images, runs and bundles")
    parser.add_argument(
        "--cpu-minutes",
        type=float,
        help="processor time of one network's training; then it is saved and left",
    )
    arguments = parser.parse_args(argv)
    images = linked(arguments.data, CLASSES, arguments.work / "images")
    rows, code = [], DONE
    for name in arguments.networks:
        stored = arguments.work / f"{name}.json"
        if not stored.is_file():
            try:
                bundle = exported(name, images, arguments.work, arguments.epochs, arguments.cpu_minutes)
            except CheckError as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                code = error.exit_code
                continue
            if bundle is None:
                continue
            write_atomically(stored, json.dumps(asdict(measured(name, bundle, images / "test")), indent=1))
        rows.append(msgspec.json.decode(stored.read_bytes(), type=Row))
        print(f"{name}: {stored.read_text()}", file=sys.stderr, flush=True)
    print(as_table(rows))
    return code


def linked(data: Path, classes: Sequence[str], folder: Path) -> Path:
    """-> `folder`, which holds these classes of `data` under their names. Raises UsageError."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name in classes:
            link, target = folder / split / name, (data / split / name).resolve()
            if not target.is_dir():
                raise UsageError(f"{data / split} has no folder {name}; give CIFAR-100 as folders of images.")
            if not link.is_symlink():
                link.symlink_to(target, target_is_directory=True)
    return folder


def exported(name: str, images: Path, work: Path, epochs: int, minutes: float | None) -> Path | None:
    """-> the bundle of a trained network, None where its training has used up its time."""
    run, bundle = work / "runs" / name, work / "bundles" / name / "branch0"
    if not (run / SUMMARY).is_file():
        given = ["--data", str(images), "--branches", f"timm:{name}", "--epochs", str(epochs), *TRAINING]
        flags = ["--resume", str(run)] if run.exists() else [*given, "--out", str(run)]
        if limited([sys.executable, "-m", "train.run", *flags], minutes) == INTERRUPTED:
            print(f"{name}: training is not finished; call again to go on.", file=sys.stderr, flush=True)
            return None
    if not (bundle / "model.int8.onnx").exists():
        flags = [str(run), "--target", "branch0", "--precision", "int8", "--out", str(bundle.parent)]
        limited([sys.executable, "-m", "export.cli", *flags], None)
    return bundle


def limited(command: list[str], minutes: float | None) -> int:
    """Run `command`, and ask it to stop (SIGINT) when it has used so much processor time; -> its exit code.
    Raises CheckError where it fails."""
    process = subprocess.Popen(command)
    asked = False
    try:
        while process.poll() is None:
            if minutes is not None and not asked and processor_seconds(process.pid) > 60 * minutes:
                process.send_signal(signal.SIGINT)
                asked = True
            time.sleep(TICK)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait()
    if process.returncode not in (DONE, INTERRUPTED):
        raise CheckError(f"{' '.join(command[1:4])} ... ended with exit code {process.returncode}.")
    return process.returncode


def processor_seconds(process: int) -> float:
    """-> what a process has used so far, with its threads. 0 where the kernel does not say."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError):
        return 0.0


def measured(name: str, folder: Path, test: Path) -> Row:
    """-> the int8 file of a bundle against its fp32 file, on all images of `test`."""
    bundle = load_bundle(folder)
    pixels, labels = read(test, list(bundle.classes), 10_000, bundle.preprocessing)
    exact, logits = (
        in_batches(runner(bundle, variant, "onnxruntime", 1), pixels) for variant in ("fp32", "int8")
    )
    details = bundle.variant("int8").details or Details()
    if details.quantisation is None or details.certificate is None or not details.certificate.holds:
        raise CheckError(f"{folder}: its int8 file has no certificate; delete the folder and run this again.")
    count, in_float = convolutions(bundle)
    return Row(
        network=name,
        images=len(pixels),
        accuracy=float((exact.argmax(axis=1) == labels).mean()),
        int8_accuracy=float((logits.argmax(axis=1) == labels).mean()),
        agreement=float((exact.argmax(axis=1) == logits.argmax(axis=1)).mean()),
        mean_kl=compare(exact, logits).mean_kl,
        method=details.quantisation.chosen.method,
        convolutions=count,
        float_convolutions=in_float,
    )


def convolutions(bundle: Bundle) -> tuple[int, list[str]]:
    """-> (how many convolutions the int8 file has, the names of those that have float weights)."""
    import onnx

    graph = onnx.load(bundle.folder / bundle.variant("int8").file).graph
    quantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    nodes = [node for node in graph.node if node.op_type == "Conv"]
    return len(nodes), [node.name for node in nodes if node.input[1] not in quantized]


def as_table(rows: Sequence[Row]) -> str:
    """-> Markdown."""
    return table(
        ["network", "images", "fp32", "int8", "agreement", "mean KL", "method", "convolutions in float"],
        [
            [
                row.network,
                f"{row.images:,}",
                percent(row.accuracy, 1),
                percent(row.int8_accuracy, 1),
                percent(row.agreement, 1),
                f"{row.mean_kl:.5f}",
                row.method,
                f"{len(row.float_convolutions)} of {row.convolutions}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
