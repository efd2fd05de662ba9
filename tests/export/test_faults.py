"""Each way in which an export can be wrong is put in on purpose, and must be caught by the gate that is there for it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import export.variants
from export.cli import main
from export.onnx_graph import SCOPES, DeployedModel, GraphOptions, write_onnx
from ffl_deploy.checkpoint import load_network
from ffl_deploy.command import run_command
from ffl_deploy.errors import CheckError
from ffl_deploy.networks.targets import build_target
from ffl_deploy.run_directory import Run


@pytest.fixture(scope="module")
def clean(colour_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fused model of the colour run as a file without a fault."""
    model = DeployedModel(build_target(load_network(colour_run).network, "fused"), colour_run.mean, colour_run.std).eval()
    path = tmp_path_factory.mktemp("clean") / "model.onnx"
    write_onnx(model, path, colour_run.preprocessing.height, colour_run.preprocessing.width, GraphOptions(), {})
    return path


@pytest.fixture
def export_with(
    colour_run: Run, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[Path], None]], tuple[int, str]]:
    """-> run ffl-export with a fault put into the written file; (exit code, the sentence on stderr)."""

    def export(fault: Callable[[Path], None]) -> tuple[int, str]:
        def write(model: DeployedModel, path: Path, *_: object) -> None:
            shutil.copy(clean, path)
            fault(path)

        monkeypatch.setattr(export_variants, "write_onnx", write)
        monkeypatch.setattr("export.pipeline.fit_temperature", lambda *_: 1.0)  # the clean file has none
        code = run_command(main, [str(colour_run.folder), "--target", "fused", "--out", str(tmp_path / "out")])
        left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert (code == 0) == bool(left), "a failed gate leaves no file behind, a good export does"
        return code, capsys.readouterr().err

    export_variants = export.variants_module = __import__("export.variants", fromlist=["variants"])
    return export
