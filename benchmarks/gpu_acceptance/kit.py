"""Packs what a bare machine with a GPU lacks: `make gpu-kit DATA=CIFAR100_FOLDER OFFICIAL=CLONE`.

.gpu/wheels/    packages that it has not got (it has Python 3.12, torch, onnx, onnxruntime and their like)
.gpu/cifar.npz  18,000 training and 4,000 test images
.gpu/official/  three files of the official code
.gpu/run.sh     installs the wheels into a folder of their own, and runs all stages
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_acceptance.images import pack
from ffl_deploy.command import run_command
from ffl_deploy.errors import CheckError, UsageError

WHEELS = ("msgspec", "simplejpeg")
IMAGES = {"train": 18_000, "test": 4_000}
OFFICIAL = ("our_network.py", "utils.py", "train_FFL.py")
MOST = 52 * 2**20  # bytes


def download(folder: Path, python: str, constraints: Path) -> None:
    """Fetch the wheels in the versions that are tested, for Linux and `python`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", python, "--platform", "manylinux_2_28_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", "-c", str(constraints), "-d", str(folder), *WHEELS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckError(f"pip cannot fetch the wheels: {done.stderr.strip().splitlines()[-1]}")


def build(kit: Path, data: Path | None, official: Path | None, python: str) -> int:
    """Make the kit; -> its bytes. Raises UsageError, CheckError."""
    shutil.rmtree(kit, ignore_errors=True)
    kit.mkdir(parents=True)
    download(kit / "wheels", python, Path("constraints.txt"))
    if data is not None:
        if not (data / "train").is_dir():
            raise UsageError(f"{data} has no train/CLASS/*; give the folder of CIFAR-100's images.")
        pack(data, IMAGES, kit / "cifar.npz")
    if official is not None:
        missing = [name for name in OFFICIAL if not (official / name).is_file()]
        if missing:
            raise UsageError(
                f"{official} is no clone of Jangho-Kim/FFL-pytorch: it has no {', '.join(missing)}."
            )
        (kit / "official").mkdir()
        for name in OFFICIAL:
            shutil.copy(official / name, kit / "official" / name)
    shutil.copy(Path(__file__).with_name("run.sh"), kit / "run.sh")
    size = sum(path.stat().st_size for path in kit.rglob("*") if path.is_file())
    if size > MOST:
        raise CheckError(f"the kit takes {size / 2**20:.1f} MB, more than {MOST >> 20}; pack fewer images.")
    return size


def main(argv: Sequence[str]) -> int:
    """-> exit code."""
    parser = argparse.ArgumentParser(
        prog="make gpu-kit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".gpu"), metavar="DIR")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="CIFAR-100 as train/CLASS/* and test/CLASS/*"
    )
    parser.add_argument("--official", type=Path, metavar="CLONE", help="a clone of Jangho-Kim/FFL-pytorch")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="of the machine with the GPU")
    arguments = parser.parse_args(argv)
    size = build(arguments.out, arguments.data, arguments.official, arguments.python)
    for name, given in (("images", arguments.data), ("the official code", arguments.official)):
        if given is None:
            print(f"without {name}: the stages that need them will say so", file=sys.stderr)
    print(f"{arguments.out}: {size / 2**20:.1f} MB; copy the project with it, and start its run.sh OUT there")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
