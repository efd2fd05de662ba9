"""`python -m train.branch_weights RUN`: one branch as a plain state_dict (safetensors),
for fine-tuning elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ffl_deploy.command import Parser, run_command
from ffl_deploy.errors import UsageError
from ffl_deploy.files import write_atomically
from ffl_deploy.run_directory import load_run


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    parser = Parser(
        prog="python -m train.branch_weights",
        description="Write one branch under the names of the library that its backbone comes from.",
        examples=(
            "python -m train.branch_weights runs/quickstart --out branch0.safetensors",
            "python -m train.branch_weights runs/quickstart --branch 1 --out branch1.safetensors",
        ),
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--branch", type=int, default=0, metavar="K", help="which branch (default: 0)")
    parser.add_argument(
        "--checkpoint",
        choices=("best", "last", "ema"),
        default="best",
        help="which weights (default: best)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="file to write")
    arguments = parser.parse_args(argv)
    print(write_branch(arguments.run, arguments.branch, arguments.checkpoint, arguments.out))
    return 0


def write_branch(run_folder: Path, branch: int, checkpoint: str, out: Path) -> str:
    """Write branch number `branch` to `out`; -> what to do with it. Raises UsageError,
    and CheckError for a damaged run.

    The file's metadata says how the weights want their images: size, mean and std on the 0..1 scale, filter
    and share of the shorter side.
    """
    from safetensors.torch import save

    from ffl_deploy.networks.checkpoint import load_network
    from ffl_deploy.networks.plain_weights import plain_weights

    if out.is_dir():
        raise UsageError(
            f"{out} is a folder; give --out the name of a file, such as {out / 'branch.safetensors'}."
        )
    run = load_run(run_folder)
    loaded = load_network(run, checkpoint)
    name = loaded.network.config.branches[branch] if 0 <= branch < len(loaded.network.branches) else ""
    weights = plain_weights(loaded.network, branch)
    metadata = {
        "format": "pt",
        "model": name,
        "classes": msgspec.json.encode(run.classes).decode(),
        "image_size": f"{run.preprocessing.height}x{run.preprocessing.width}",
        "mean": msgspec.json.encode([round(value / 255, 6) for value in run.mean]).decode(),
        "std": msgspec.json.encode([round(value / 255, 6) for value in run.std]).decode(),
        "filter": msgspec.json.encode(run.preprocessing.filter).decode(),
        "crop_fraction": msgspec.json.encode(run.preprocessing.crop_fraction).decode(),
        "source": f"{run.name}/{checkpoint} sha256:{loaded.sha256}",
    }
    write_atomically(out, save({key: value.contiguous() for key, value in weights.tensors.items()}, metadata))
    if weights.missing:
        shown = ", ".join(weights.missing[:4]) + (
            f" and {len(weights.missing) - 4} more" if len(weights.missing) > 4 else ""
        )
        return (
            f"wrote {out} for {name} without its classifier, which is more than pooling and one linear layer "
            f"there: {shown} have to be trained (load with strict=False)."
        )
    return (
        f"wrote {out}; {name} with {len(run.classes)} classes loads it as it is and gives branch {branch}'s "
        "logits."
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
