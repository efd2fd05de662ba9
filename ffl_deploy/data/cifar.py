"""CIFAR-10 and CIFAR-100 from torchvision's own files, the one place here that uses torchvision."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ffl_deploy.data.splits import ArraySplit
from ffl_deploy.downloads import require_answer
from ffl_deploy.errors import UsageError


def read_cifar(name: str, root: Path) -> tuple[tuple[str, ...], ArraySplit, ArraySplit]:
    """-> (classes, training images, test images) of "cifar10" or "cifar100", uint8 32 x 32.

    The files (md5-checked by torchvision) lie under `root`, or are downloaded to it. Raises UsageError.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    folder = root / kind.base_folder
    present = folder.is_dir()
    try:
        if not present:
            require_answer(kind.url)
        train = kind(root, train=True, download=not present)
        test = kind(root, train=False)
    except Exception as error:  # urllib, tarfile, hashing and pickle each have their own
        if present:
            raise UsageError(
                f"{folder} is incomplete or damaged ({error}); remove it, then download or copy it again."
            ) from error
        raise UsageError(
            f"{name} is not under {root} and cannot be downloaded ({error}); put torchvision's files there "
            f"({folder}), name their place with --data-root DIR, or give a folder of images with --data DIR."
        ) from error
    images = [ArraySplit(part.data, np.asarray(part.targets, np.int64)) for part in (train, test)]
    return tuple(train.classes), images[0], images[1]
