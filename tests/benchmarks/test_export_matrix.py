"""benchmarks.export_matrix: a cell is a file's distance from PyTorch, or why there is no file."""

from __future__ import annotations

import msgspec

from benchmarks.export_matrix import NETWORKS, main, outcomes
from ffl_deploy.bundle import Bundle
from ffl_deploy.command import run_command
from ffl_deploy.manifest import RefusedVariant


def test_a_refusal_is_told_by_its_reason(tiny_bundle: Bundle) -> None:
    refused = [RefusedVariant("fp16", "layer conv1 passes 65504"), RefusedVariant("int8-tensorrt", "KL 0.02")]
    bundle = Bundle(tiny_bundle.folder, msgspec.structs.replace(tiny_bundle.manifest, refused=refused))
    row = outcomes("tiny", bundle)
    assert row[:2] == ["tiny", tiny_bundle.manifest.target]
    assert row[2:4] == ["layer conv1 passes 65504", "not there, and no reason given"]
    assert row[4] == "KL 0.02"
    assert outcomes("tiny", tiny_bundle)[2] == "not there, and no reason given"


def test_nine_kinds_of_networks_and_no_others() -> None:
    assert len(NETWORKS) == 9
    assert run_command(main, ["--networks", "resnet9"]) == 2
