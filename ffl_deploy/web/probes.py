"""Small pictures whose pixels Python has written down:
the page decodes them and says whether they are the same."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from ffl_deploy.files import write_atomically
from ffl_deploy.images import decode

UPRIGHT_FROM = 6  # EXIF orientation of the JPEG: turned by a quarter, as telephones write it


class Probe(msgspec.Struct, frozen=True):
    """`pixels`: base64 of uint8 RGB [height, width, 3]; `allowed`:
    the largest difference that is no finding."""

    name: str
    file: str
    width: int
    height: int
    pixels: str
    allowed: int


def write_probes(folder: Path) -> list[Probe]:
    """Write the probes into `folder`/probes; equal versions of Pillow give equal files."""
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (13, 17, 4), dtype=np.uint8)
    rows, columns = np.mgrid[0:24, 0:40]
    smooth = np.stack([rows * 10, columns * 6, (rows + columns) * 4], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = UPRIGHT_FROM
    return [
        _write(folder, "PNG", "png", colors[..., :3], 0, {}),
        _write(folder, "PNG with transparency", "alpha.png", colors, 0, {}),
        _write(
            folder, "JPEG, turned", "jpg", smooth, 3, {"quality": 90, "subsampling": "4:2:0", "exif": exif}
        ),
    ]


def _write(
    folder: Path, name: str, suffix: str, pixels: np.ndarray, allowed: int, options: dict[str, object]
) -> Probe:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG" if suffix == "jpg" else "PNG", **options)
    file = f"probes/probe.{suffix}"
    write_atomically(folder / file, encoded.getvalue())
    wanted = decode(encoded.getvalue())
    return Probe(
        name, file, wanted.width, wanted.height, base64.b64encode(wanted.pixels.tobytes()).decode(), allowed
    )
