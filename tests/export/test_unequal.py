"""First exits that cost little: a cheap branch before a dear one, and the exit on the trunk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.cli import main
from export.publish.cost import multiply_adds
from export.publish.report import write_report
from export.publish.side_by_side import kinds_of
from ffl_deploy.bundle import load_bundle
from ffl_deploy.report import ArtefactLimits
from ffl_deploy.run_directory import Run, load_run


def trained(folder: Path, *flags: str) -> Run:
    from train.run import main as train

    fast = ["--epochs", "2", "--device", "cpu", "--precision", "fp32", "--quiet"]
    assert train([*fast, *flags, "--out", str(folder)]) == 0
    return load_run(folder)


@pytest.fixture(scope="module")
def trunk_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "trunk"
    return trained(folder, "--branches", "resnet8,resnet8", "--trunk-exit")


@pytest.fixture(scope="module")
def trunk_bundles(trunk_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """-> a folder with the bundles trunk, trunk+fused and fused."""
    out = tmp_path_factory.mktemp("bundles")
    flags = ["--target", "trunk", "--target", "trunk+fused", "--target", "fused", "--max-deferred", "0.5"]
    assert main([str(trunk_run.folder), *flags, "--precision", "int8", "--out", str(out)]) == 0
    return out


def convolutions(path: Path) -> int:
    return sum(node.op_type == "Conv" for node in onnx.load(path).graph.node)


def test_the_exit_on_the_trunk_is_a_target_and_the_first_of_a_cascade(
    trunk_run: Run, trunk_bundles: Path
) -> None:
    trunk, cascade, fused = (load_bundle(trunk_bundles / name) for name in ("trunk", "trunk+fused", "fused"))
    accuracies = json.loads((trunk_run.folder / "summary.json").read_text())["accuracy"]
    assert accuracies.keys() == {"fused", "ensemble", "branch0", "branch1", "trunk"}
    assert convolutions(trunk.folder / "model.onnx") < convolutions(fused.folder / "model.onnx")

    images = cascade.golden().images
    for variant in ("fp32", "int8"):
        record = cascade.variant(variant).details.cascade
        assert record is not None
        assert record.exits == ["trunk", "fused"]
        assert 0 < record.deferred < 1
    answered = cascade.session().run(images)
    one, other = (bundle.session().run(images).logits for bundle in (trunk, fused))
    assert answered.exit is not None
    expected = np.where(answered.exit[:, None] == 0, one, other)
    np.testing.assert_allclose(answered.logits, expected, atol=1e-3 * expected.std())


def test_what_the_trunk_computed_is_not_computed_again(trunk_bundles: Path) -> None:
    cascade, fused, trunk = (
        convolutions(trunk_bundles / name / "model.onnx") for name in ("trunk+fused", "fused", "trunk")
    )
    own = 2  # convolutions of the exit itself, on top of the trunk's
    assert cascade == fused + own
    assert trunk - own < fused


def test_the_report_counts_a_cascade_by_the_share_that_it_defers(trunk_bundles: Path, tmp_path: Path) -> None:
    files = {name: trunk_bundles / name / "model.onnx" for name in ("trunk", "fused", "trunk+fused")}
    first, last = multiply_adds(files["trunk"]), multiply_adds(files["fused"])
    none, every = (multiply_adds(files["trunk+fused"], share) for share in (0.0, 1.0))
    assert none == first
    assert last < every < first + last
    record = load_bundle(trunk_bundles / "trunk+fused").variant().details.cascade
    assert record is not None

    out = tmp_path / "bundles"
    shutil.copytree(trunk_bundles, out)
    report = write_report(out, ArtefactLimits())
    row = next(row for row in report.rows if row.name == "trunk+fused/fp32")
    assert row.multiply_adds == round(none + record.deferred * (every - none))
    assert row.p50_ms == next(one.cascade_ms for one in record.times if one.batch == 1)
    assert (
        "at the share of the test images that it deferred (trunk+fused/fp32 "
        in (out / "report.md").read_text()
    )
    written = {row["target"]: row for row in json.loads((out / "report.json").read_text())["rows"]}
    assert "deferred" not in written["fused"], "others' rows are what they were"
    assert written["trunk+fused"]["deferred"] > 0


def test_a_cascade_is_timed_by_both_kinds_of_images(trunk_bundles: Path) -> None:
    bundle = load_bundle(trunk_bundles / "trunk+fused")
    session, record = bundle.session(), bundle.variant().details.cascade
    assert record is not None
    kinds = kinds_of(bundle, bundle.variant(), session)
    assert [kind.share for kind in kinds] == [1 - record.deferred, record.deferred]
    exits = [session.run(kind.image).exit for kind in kinds]
    assert [one.tolist() for one in exits if one is not None] == [[0], [1]]
    fused = load_bundle(trunk_bundles / "fused")
    (only,) = kinds_of(fused, fused.variant(), fused.session())
    assert only.share == 1


@pytest.mark.slow
def test_a_cheap_branch_comes_first(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "--branches", "resnet8,resnet20")
    flags = ["--target", "cascade", "--target", "fused", "--max-deferred", "0.6"]
    assert main([str(run.folder), *flags, "--out", str(tmp_path)]) == 0
    cascade = load_bundle(tmp_path / "cascade")
    assert cascade.variant().exits == ["branch0", "fused"]
    assert cascade.manifest.source.branches == ["resnet8", "resnet20"]
    counted = convolutions(cascade.folder / "model.onnx"), convolutions(tmp_path / "fused" / "model.onnx")
    assert counted[0] == counted[1]
