"""Runs of an earlier version open, resume and export (tests/fixtures/before/run/README.md)."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ffl_deploy.command import run_command
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.run_directory import load_run
from train.record import read_metrics
from train.run import main

RUNS = Path(__file__).parent.parent / "fixtures" / "before" / "run" / "runs.tar.xz"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    with tarfile.open(RUNS) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_an_interrupted_run_resumes_where_it_stood_and_finishes(runs: Path) -> None:
    folder = runs / "interrupted"
    state = json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
    assert (state["epoch"], state["step"], state["images"]) == (0, 6, 768)
    threads = torch.get_num_threads()
    try:
        assert run_command(main, ["--resume", str(folder), "--quiet"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert [line["epoch"] for line in read_metrics(folder)] == [0, 1]
    after = json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
    counts = load_run(folder).config.split["images_per_class"]["train"]
    # the epoch's images are counted once
    assert (after["epoch"], after["step"], after["images"]) == (2, 0, 2 * sum(counts))
    assert set(json.loads((folder / "summary.json").read_text())["accuracy"]) == {
        "fused",
        "ensemble",
        "branch0",
        "branch1",
    }


def test_a_finished_run_gives_the_logits_that_it_stored(runs: Path) -> None:
    run = load_run(runs / "finished")
    images, _, logits = run.reference("best", "fused")
    network = load_network(run, "best").network
    normalized = (images.astype(np.float32) - np.float32(run.mean)) / np.float32(run.std)
    with torch.no_grad():
        found = network(torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy())).fused.numpy()
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4 * logits.std())


def test_a_finished_run_exports(runs: Path) -> None:
    pytest.importorskip("onnx")
    from export.cli import main as export

    out = runs / "bundles"
    assert run_command(export, [str(runs / "finished"), "--target", "fused", "--out", str(out)]) == 0
    assert list(out.rglob("bundle.json"))
