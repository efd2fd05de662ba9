"""HEIC and AVIF, what phones write: read where that is possible, named with what to do where it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ffl_deploy.images import SUFFIXES, ImageError, decode, size_of

ROOT = Path(__file__).parents[2]
WRITE = """
import sys
import numpy as np
from PIL import Image
import pillow_heif
pillow_heif.register_heif_opener()
pixels = np.zeros((30, 40, 3), np.uint8)
pixels[:, 20:] = (250, 20, 120)
exif = Image.Exif()
exif[0x112] = 6
Image.fromarray(pixels).save(sys.argv[1], quality=90, **({"exif": exif} if len(sys.argv) > 2 else {}))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """-> a folder with photo.heic and photo.avif, 40 x 30 pixels: black, and from the middle on red. Another
    process writes them, in which nothing of ours is loaded."""
    folder = tmp_path_factory.mktemp("photos")
    for name, *turned in (("photo.heic",), ("photo.avif",), ("turned.avif", "turned")):
        command = [sys.executable, "-c", WRITE, str(folder / name), *turned]
        subprocess.run(command, check=True, cwd=folder)
    return folder


@pytest.mark.parametrize("name", ["photo.heic", "photo.avif"])
def test_they_are_read(photos: Path, name: str) -> None:
    decoded = decode((photos / name).read_bytes())
    assert not decoded.animated
    assert decoded.pixels.shape == (30, 40, 3)
    np.testing.assert_allclose(decoded.pixels[15, 5], (0, 0, 0), atol=12)
    np.testing.assert_allclose(decoded.pixels[15, 35], (250, 20, 120), atol=12)
    assert size_of(photos / name) == (40, 30)
    assert name.endswith(SUFFIXES)


def test_orientation_is_applied(photos: Path) -> None:
    assert decode((photos / "turned.avif").read_bytes()).pixels.shape == (40, 30, 3)


@pytest.mark.parametrize("name", ["photo.heic", "photo.avif"])
def test_a_cut_one_is_a_code(photos: Path, name: str) -> None:
    data = (photos / name).read_bytes()
    for length in (20, len(data) // 2, len(data) - 10):
        with pytest.raises(ImageError) as caught:
            decode(data[:length])
        assert caught.value.code in ("corrupt", "truncated", "not_an_image")


def test_what_only_begins_like_a_photograph_of_a_phone_is_corrupt() -> None:
    with pytest.raises(ImageError) as caught:
        decode(b"\0\0\0\x18ftypheic" + bytes(range(200)))
    assert caught.value.code == "corrupt"
    with pytest.raises(ImageError, match="not one of JPEG, PNG, WEBP, BMP, GIF, TIFF, HEIF, AVIF"):
        decode(b"no picture")


def test_many_threads_may_be_the_first(photos: Path) -> None:
    code = f"""
import threading
from ffl_deploy.images import decode
data = open({str(photos / "photo.heic")!r}, "rb").read()
shapes = []
threads = [threading.Thread(target=lambda: shapes.append(decode(data).pixels.shape)) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(set(shapes), len(shapes))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "{(30, 40, 3)} 16\n"


HIDE = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("pillow_heif", "PIL._avif") else found(name, *rest)
from ffl_deploy.images import SUFFIXES, ImageError, decode
for name in sys.argv[1:]:
    assert not name.endswith(SUFFIXES)
    try:
        decode(open(name, "rb").read())
    except ImageError as error:
        print(error.code, error)
"""  # noqa: E501


def test_where_they_cannot_be_read_the_row_says_what_to_do(photos: Path) -> None:
    names = [str(photos / name) for name in ("photo.heic", "photo.avif")]
    done = subprocess.run(
        [sys.executable, "-c", HIDE, *names], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines() == [
        "unsupported HEIF is read with the extra heif of ffl-deploy, or convert it to JPEG",
        "unsupported AVIF is read with Pillow 11.3 or newer, or convert it to JPEG",
    ]


def test_nothing_is_loaded_for_other_formats() -> None:
    code = "import io, sys; from ffl_deploy.images import load; load('examples/cifar100/images/clock.jpg')"
    check = (
        "print([name for name in ('pillow_heif', 'PIL.AvifImagePlugin', 'PIL._avif') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {check}"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"
