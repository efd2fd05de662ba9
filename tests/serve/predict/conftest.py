"""Images, bundles and a runner of ffl-predict for the tests of batch inference."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle
from ffl_deploy.command import run_command
from serve.predict import main


@dataclass(frozen=True)
class Run:
    """What one ffl-predict did."""

    code: int
    rows: list[dict[str, Any]]
    out: Path
    stdout: str
    stderr: str

    @property
    def statuses(self) -> list[str]:
        return [row["status"] for row in self.rows]

    def row(self, name: str) -> dict[str, Any]:
        """-> the one row whose path ends with `name`."""
        (found,) = [row for row in self.rows if row["path"].endswith(name)]
        return found


def photo_bytes(seed: int, format: str = "JPEG", size: tuple[int, int] = (48, 40), **options: object) -> bytes:
    """-> a seeded image: smooth colours with some noise, so that JPEG has something to do. size: width, height."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.clip(np.asarray(coarse, np.int16) + rng.integers(-8, 9, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def photo() -> Callable[..., bytes]:
    return photo_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good images: a.jpg, b.png, sub/c.webp."""
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    (root / "a.jpg").write_bytes(photo_bytes(1))
    (root / "b.png").write_bytes(photo_bytes(2, "PNG"))
    (root / "sub" / "c.webp").write_bytes(photo_bytes(3, "WEBP"))
    return root


@pytest.fixture
def predict(tiny_bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """`predict(input, ..., flags=[...], out="p.jsonl", bundle=None) -> Run`, in this process, through the command's own entry."""

    def run(*inputs: object, flags: Sequence[str] = (), out: str = "predictions.jsonl", bundle: Bundle | None = None) -> Run:
        path = tmp_path / "out" / out
        folder = str((bundle or tiny_bundle).folder)
        capfd.readouterr()
        code = run_command(main, [folder, *map(str, inputs), "--out", str(path), *flags])
        captured = capfd.readouterr()
        rows = []
        if path.suffix == ".jsonl" and path.is_file():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return Run(code, rows, path, captured.out, captured.err)

    return run
