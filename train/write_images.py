"""`python -m train.write_images DIR`: a data set's split as an image folder DIR/CLASS/*.png,
to look at or to predict on."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ffl_deploy.command import Parser, run_command
from ffl_deploy.data.datasets import DataSpec, ImageData, load_data
from ffl_deploy.errors import UsageError
from ffl_deploy.files import replace_folder


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    parser = Parser(
        prog="python -m train.write_images",
        description=(__doc__ or "").partition(": ")[2],
        examples=(
            "python -m train.write_images digits",
            "python -m train.write_images photos --data cifar100 --part train",
        ),
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder to write; one that this command wrote is replaced"
    )
    parser.add_argument(
        "--data", default="digits", help="digits, cifar10, cifar100 or an image folder (default: digits)"
    )
    parser.add_argument("--data-root", type=Path, help="where CIFAR's own files lie")
    parser.add_argument(
        "--part",
        choices=("train", "validation", "test"),
        default="test",
        help="which split (default: test)",
    )
    arguments = parser.parse_args(argv)
    require_own(arguments.folder)
    root = str(arguments.data_root) if arguments.data_root else None
    count = write_images(
        load_data(DataSpec(source=arguments.data, root=root)), arguments.part, arguments.folder
    )
    print(f"{count} images in {arguments.folder}")
    return 0


def require_own(folder: Path) -> None:
    """Raise UsageError where `folder` holds anything that this command does not write,
    which replacing it would delete."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or not folder.name or folder.is_symlink():
        raise UsageError(f"{folder} is not a folder of its own; give the name of a new one.")
    for parent, folders, files in os.walk(folder):
        inside = Path(parent).relative_to(folder)
        foreign = (
            files
            if inside == Path()
            else [*folders, *(name for name in files if not re.fullmatch(r"\d{6}\.png", name))]
        )
        if foreign:
            raise UsageError(
                f"{folder} holds {inside / foreign[0]}, which this command did not write; give the name of "
                "a new folder."
            )


def write_images(data: ImageData, part: str, folder: Path) -> int:
    """Write split `part` ("train", "validation", "test") of `data` as folder/CLASS/NUMBER.png;
    -> number of images."""
    from PIL import Image

    split = {"train": data.train, "validation": data.validation, "test": data.test}[part]
    with replace_folder(folder) as new:
        for name in data.classes:
            (new / name).mkdir()
        for index, label in enumerate(split.labels):
            pixels = split.read(slice(index, index + 1))[0]
            Image.fromarray(pixels).save(new / data.classes[label] / f"{index:06d}.png")
    return len(split)


if __name__ == "__main__":
    sys.exit(run_command(main))
