"""What export gives of nine kinds of networks in fp16, bf16 and int8, and why it refuses what it refuses.

    python -m benchmarks.export_matrix --work MATRIX

Each network is trained for an epoch on the digits, which is enough for gates that compare a file with its own
network, and exported by `ffl-export`. What is finished is kept in --work and not done again. Prints a table.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.int8_networks import convolutions
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.command import Parser, run_command
from ffl_deploy.errors import CHECK_FAILED, DONE, CheckError, UsageError
from ffl_deploy.manifest import MANIFEST
from ffl_deploy.markdown import table
from ffl_deploy.run_directory import SUMMARY

PRECISIONS = ("fp16", "bf16", "int8")


class Network(NamedTuple):
    """What is trained, and which of its classifiers is exported."""

    branches: str
    method: str
    target: str


NETWORKS = {
    "resnet8": Network("resnet8,resnet8", "ffl", "fused"),
    "one": Network("resnet8,resnet8,resnet8", "one", "gated"),
    "convnext_atto": Network("timm:convnext_atto", "vanilla", "branch0"),
    "mobilevit_xxs": Network("timm:mobilevit_xxs", "vanilla", "branch0"),
    "edgenext_xx_small": Network("timm:edgenext_xx_small", "vanilla", "branch0"),
    "efficientnet_lite0": Network("timm:efficientnet_lite0", "vanilla", "branch0"),
    "efficientnet_b0": Network("timm:efficientnet_b0", "vanilla", "branch0"),
    "mobilenetv3_small_050": Network("resnet8,timm:mobilenetv3_small_050", "ffl", "fused"),
    "shufflenet_v2_x0_5": Network("resnet8,torchvision:shufflenet_v2_x0_5", "ffl", "fused"),
}
TRAINING = ("--data", "digits", "--image-size", "32", "--epochs", "1", "--batch-size", "32", "--no-flip")
TRAINING += ("--optimizer", "adamw", "--lr", "0.002", "--precision", "fp32", "--device", "cpu")
TRAINING += ("--threads", "1")


def main(argv: Sequence[str]) -> int:
    """Run the command; -> 0, or 1 where a network gave no bundle at all."""
    parser = Parser(prog="python -m benchmarks.export_matrix", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("export_matrix"), help="runs and bundles")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), metavar="NAME")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.networks if name not in NETWORKS]:
        raise UsageError(f"there is no network {unknown[0]!r}. Known: {', '.join(NETWORKS)}.")
    rows = []
    for name in arguments.networks:
        rows.append(outcomes(name, exported(name, arguments.work)))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(["network", "target", *PRECISIONS], rows))
    return DONE


def exported(name: str, work: Path) -> Bundle:
    """-> the bundle of this network. Raises CheckError where a command crashes, or leaves none."""
    network, run, out = NETWORKS[name], work / "runs" / name, work / "bundles" / name
    if not (run / SUMMARY).is_file():
        flags = ["--branches", network.branches, "--method", network.method, "--quiet", "--out", str(run)]
        ran(["train.run", *(["--resume", str(run)] if run.exists() else [*TRAINING, *flags])], (DONE,))
    if not (out / network.target / MANIFEST).is_file():
        wanted = [word for precision in PRECISIONS for word in ("--precision", precision)]
        flags = ["--target", network.target, "--out", str(out), *wanted]
        ran(["export.cli", str(run), *flags], (DONE, CHECK_FAILED))
    return load_bundle(out / network.target)


def ran(words: Sequence[str], codes: Sequence[int]) -> None:
    """Run a module; raises CheckError for another exit code than these."""
    code = subprocess.run([sys.executable, "-m", *words]).returncode
    if code not in codes:
        raise CheckError(f"{' '.join(words[:2])} ended with exit code {code}.")


def outcomes(name: str, bundle: Bundle) -> list[str]:
    """-> the cells of a network's row: of each precision its distance from PyTorch, or why there is none."""
    cells = [name, bundle.manifest.target]
    refused = [] if bundle.manifest.refused is msgspec.UNSET else bundle.manifest.refused
    for precision in PRECISIONS:
        passed = [one for one in bundle.manifest.variants if one.name == precision]
        reasons = [one.reason for one in refused if one.name.startswith(precision)]
        if passed and passed[0].parity is not None:
            batches = passed[0].parity.batches.values()
            cell = f"{max(batch.scaled_max_diff for batch in batches):.2g} of std"
            if precision == "int8":
                count, in_float = convolutions(bundle)
                cell += f", KL {max(batch.mean_kl for batch in batches):.2g}"
                cell += f", {len(in_float)} of {count} convolutions in float"
            cells.append(cell)
        else:
            cells.append("; ".join(reasons) or "not there, and no reason given")
    return cells


if __name__ == "__main__":
    sys.exit(run_command(main))
