"""The deployment machine: the wheel in a fresh environment of each Python, where torch is not installed."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(*command: str | Path, exit_code: int = 0) -> str:
    """-> what a command printed, which ended with `exit_code`; both streams where that is not 0."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == exit_code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr if exit_code else done.stdout


def interpreter(version: str) -> Path:
    """-> a Python of `version`: this one, one on the PATH that starts, or one of pyenv's.
    Skips the test where there is none."""
    if sys.version.startswith(f"{version}."):
        return Path(sys.executable)
    found = [shutil.which(f"python{version}")]
    found += sorted(
        Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
    )
    for path in filter(None, found):
        # a shim of pyenv's exists for versions that the folder does not select, and fails
        if subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return Path(path)
    pytest.skip(f"there is no Python {version} on this machine")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    return next(folder.glob("ffl_deploy-*.whl"))


def test_the_wheel_holds_the_packages_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names if not name.startswith("ffl_deploy-")}
    assert folders == {"ffl_deploy", "train", "export", "serve"}


@pytest.mark.parametrize("version", PYTHONS)
def test_a_runtime_alone_verifies_and_predicts(
    version: str, wheel: Path, tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    """`[cpu]`: to the screen, CSV and JSON lines. Parquet is refused with a line to type, and works once
    that is typed."""
    environment = tmp_path / "environment"
    run(interpreter(version), "-m", "venv", environment)
    programs = environment / "bin"
    pinned = ["-c", str(ROOT / "constraints.txt")]
    run(programs / "python", "-m", "pip", "install", "--quiet", *pinned, f"{wheel}[cpu]")
    listed = json.loads(run(programs / "python", "-m", "pip", "list", "--format", "json"))
    installed = {row["name"] for row in listed}
    assert not installed & {
        "torch", "torchvision", "gradio", "onnx", "scipy", "scikit-learn", "pyarrow", "matplotlib",
    }  # fmt: skip

    bundle = make_bundle(tmp_path / "bundles" / "tiny")
    assert "passed" in run(programs / "ffl-verify", bundle.folder)
    images = tmp_path / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for index in range(5):
        pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    expected = bundle.predict(sorted(images.iterdir()))
    labels = [prediction.label for prediction in expected]

    lines = run(programs / "ffl-predict", bundle.folder, images, "--top-k", "1").splitlines()
    assert [line.split()[1] for line in lines[:5]] == labels
    rows, table = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    run(programs / "ffl-predict", bundle.folder, images, "--out", rows)
    stored = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["label"] for row in stored] == labels
    np.testing.assert_allclose(
        [row["confidence"] for row in stored], [prediction.confidence for prediction in expected], rtol=1e-6
    )
    run(programs / "ffl-predict", bundle.folder, images, "--out", table)
    assert [row["label"] for row in csv.DictReader(table.read_text().splitlines())] == labels

    parquet = tmp_path / "rows.parquet"
    said = run(programs / "ffl-predict", bundle.folder, images, "--out", parquet, exit_code=2)
    assert said.count("\n") == 1
    advised = re.search(r"run: (.*?)(, or .*)?\.$", said.strip())
    assert advised, said
    subprocess.run(
        ["bash", "-ec", f". {programs}/activate; {advised[1]} --quiet {' '.join(pinned)}"],
        check=True,
        capture_output=True,
    )
    run(programs / "ffl-predict", bundle.folder, images, "--out", parquet)
    pyarrow = f"import pyarrow.parquet as p; print(*p.read_table({str(parquet)!r})['label'].to_pylist())"
    assert run(programs / "python", "-c", pyarrow).split() == labels
