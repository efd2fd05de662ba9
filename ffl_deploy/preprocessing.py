"""How pixels of any size become the network's input, as data: stored in run configurations and in bundles.

Apart from ffl_deploy/images.py, which does it: reading a manifest takes no image library.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np

Pixels = np.ndarray
"""uint8 array [height, width, 3], RGB."""


ImageSize = int | tuple[int, int]
"""Of the network's input, in pixels: a side, or width and height."""


def sides(size: ImageSize) -> tuple[int, int]:
    """-> (width, height)."""
    return (size, size) if isinstance(size, int) else size


class Look(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How weights that a network starts from want their images, where that is not the data's own way.

    mean, std: per RGB channel on the 0..1 scale; filter and crop_fraction: see Preprocessing.
    """

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    filter: Literal["box", "bilinear", "bicubic", "lanczos"] | None = None
    crop_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an image is brought to the network's size.

    `resize`: "stretch" scales both sides to `height` x `width`; "crop" scales the shorter side to `size /
    crop_fraction` and cuts out the centre (torchvision's Resize + CenterCrop with 0.875 = 256 -> 224).
    """

    height: Annotated[int, msgspec.Meta(ge=1)]
    width: Annotated[int, msgspec.Meta(ge=1)]
    resize: Literal["stretch", "crop"] = "crop"
    crop_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    filter: Literal["box", "bilinear", "bicubic", "lanczos"] = "bilinear"
