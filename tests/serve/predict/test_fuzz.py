"""Hostile bytes and large numbers: one row each, no crash, no hang, memory bounded."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.images import ImageError, decode

Photo = Callable[..., bytes]
ROOT = Path(__file__).parents[3]
STATUSES = {"ok", "empty", "not_an_image", "too_large", "truncated", "corrupt", "unsupported"}


def corrupted(rng: random.Random, originals: list[bytes]) -> bytes:
    """-> a real image with flipped bits, a cut, a repeated block, or the tail of another one."""
    data = bytearray(rng.choice(originals))
    kind = rng.choice(("flip", "header", "cut", "splice", "repeat"))
    if kind in ("flip", "header"):
        end = len(data) if kind == "flip" else min(200, len(data))
        for _ in range(rng.randint(1, 30)):
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "splice":
        other = rng.choice(originals)
        data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]
    else:
        start = rng.randrange(len(data))
        data[start:start] = data[start : start + rng.randrange(1, 500)] * rng.randint(1, 5)
    return bytes(data)


@pytest.fixture(scope="module")
def originals(photo: Photo) -> list[bytes]:
    files = [photo(seed, format, size=(64, 48)) for seed in range(4) for format in ("JPEG", "PNG", "WEBP")]
    return [
        *files,
        photo(9, "JPEG", progressive=True),
        photo(9, "WEBP", lossless=True),
        photo(9, "GIF"),
        photo(9, "TIFF"),
    ]


def test_every_corrupted_file_decodes_or_is_refused(originals: list[bytes]) -> None:
    rng = random.Random(6)
    seen: Counter[str] = Counter()
    for _ in range(600):
        data = corrupted(rng, originals)
        try:
            pixels = decode(data).pixels
        except ImageError as error:
            seen[error.code if str(error) else "no message"] += 1
        else:
            seen["ok" if pixels.ndim == 3 and pixels.shape[2] == 3 else "wrong shape"] += 1
    assert set(seen) <= STATUSES
    assert {"ok", "truncated", "corrupt"} <= set(seen)


def predicted(bundle: Bundle, source: Path, out: Path, *flags: str) -> tuple[int, float]:
    """Run ffl-predict as a process; -> (exit code, peak memory of the largest process in MiB)."""
    command = [
        sys.executable,
        "-m",
        "serve.predict",
        str(bundle.folder),
        str(source),
        "--out",
        str(out),
        "--quiet",
        *flags,
    ]
    # Linux counts what the starting process held as well, and that may be a pytest of gigabytes:
    # a small one starts it.
    starter = [sys.executable, "-c", MEASURED, *command]
    done = subprocess.run(
        starter, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=True
    )
    code, memory = done.stdout.split()
    return int(code), int(memory) / 1024


MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [int(os.environ.get("FFL_FUZZ_SEED", "2026"))])
def test_ten_thousand_corrupted_files(
    tiny_bundle: Bundle, originals: list[bytes], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    source = tmp_path / "in"
    source.mkdir()
    for index in range(10_000):
        (source / f"{index:05d}.jpg").write_bytes(corrupted(rng, originals))
    code, memory = predicted(tiny_bundle, source, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert code == 3
    assert [Path(row["path"]).name for row in rows] == [f"{index:05d}.jpg" for index in range(10_000)]
    counts = Counter(row["status"] for row in rows)
    print(f"seed {seed}: {dict(counts)}, peak {memory:.0f} MiB")
    assert set(counts) <= STATUSES
    assert memory < 2500, "two decoding threads with an image of 50 megapixels each, its RGBA and its RGB"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_with_the_number_of_images(
    tiny_bundle: Bundle, photo: Photo, tmp_path: Path
) -> None:
    """100,000 images need no more than 5 % over 10,000."""
    peaks = {}
    for count in (10_000, 100_000):
        source = tmp_path / str(count)
        source.mkdir()
        for index in range(count):
            target = source / f"{index:06d}.jpg"
            if index % 10_000 == 0:  # a file system allows some ten thousand links to one file
                target.write_bytes(photo(index, size=(24, 20)))
                original = target
            else:
                os.link(original, target)
        code, peaks[count] = predicted(
            tiny_bundle, source, tmp_path / f"{count}.parquet", "--batch-size", "64"
        )
        assert code == 0
    print(f"peak memory in MiB: {peaks}")
    assert peaks[100_000] <= 1.05 * peaks[10_000]
