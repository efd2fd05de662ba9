"""The table of oldest runtimes says what was run,
and a file whose logits are wrong does not count as read."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import oldest_runtimes
from benchmarks.oldest_runtimes import probe, table
from ffl_deploy.bundle import Bundle


def test_the_oldest_version_that_is_right_is_named() -> None:
    old = {
        "20 fp32": "right",
        "23 fp32": "Unsupported model IR version: 11",
        "20 int8": "read, but mean KL divergence is 2",
    }
    results = {
        "onnxruntime": {"1.17.3": old, "1.22.1": {"20 fp32": "right", "23 fp32": "right", "20 int8": "right"}}
    }
    assert table(results).splitlines()[2:] == [
        "| 20 | fp32 | 1.17.3 |",
        "| 23 | fp32 | 1.22.1 |",
        "| 20 | int8 | 1.22.1 |",
    ]
    results["onnxruntime"]["1.9.0"] = {"20 fp32": "right"}  # found in a later call, released before
    assert table(results).splitlines()[2] == "| 20 | fp32 | 1.9.0 |"
    results["onnxruntime"].pop("1.22.1")
    assert table(results).splitlines()[3] == "| 23 | fp32 | none |"


def test_a_file_is_run_in_another_process_and_held_to_its_gate(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path, python = tiny_bundle.folder / "model.onnx", Path(sys.executable)
    assert probe("onnxruntime", python, path, "fp32", tiny_bundle.folder, tmp_path) == "right"
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:100])
    assert probe("onnxruntime", python, broken, "fp32", tiny_bundle.folder, tmp_path) not in ("right", "read")
    assert set(oldest_runtimes.PROBE) == set(oldest_runtimes.VERSIONS) == set(oldest_runtimes.REQUIRES)
