"""The deployment machine: the wheel with two extras in a fresh environment, where torch is not installed."""

from __future__ import annotations

import json
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


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_verify_and_predict_in_an_environment_without_torch(
    tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    wheel = next(tmp_path.glob("ffl_deploy-*.whl"))
    packages = {
        name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("ffl_deploy-")
    }
    assert packages == {"ffl_deploy", "train", "export", "serve"}

    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment)
    programs = environment / "bin"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    run(programs / "python", "-m", "pip", "install", "--quiet", *constraints, f"{wheel}[predict,cpu]")
    installed = {
        row["name"] for row in json.loads(run(programs / "python", "-m", "pip", "list", "--format", "json"))
    }
    assert not installed & {"torch", "torchvision", "gradio", "onnx", "scipy", "scikit-learn"}

    bundle = make_bundle(tmp_path / "bundles" / "tiny")
    assert "passed" in run(programs / "ffl-verify", bundle.folder)
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(5):
        pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    run(programs / "ffl-predict", bundle.folder, tmp_path / "images", "--out", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    expected = bundle.predict(sorted((tmp_path / "images").iterdir()))
    assert [row["label"] for row in rows] == [prediction.label for prediction in expected]
    np.testing.assert_allclose(
        [row["confidence"] for row in rows], [prediction.confidence for prediction in expected], rtol=1e-6
    )
