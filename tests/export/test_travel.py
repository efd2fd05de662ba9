"""Runs travel: their data move, or stay where they may not leave; and no other run's model is replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from export.cli import main
from export.publish.triton import model_names, write_repository
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.errors import UsageError
from ffl_deploy.run_directory import Run
from ffl_deploy.verify import main as verify


@pytest.fixture
def moved(colour_run: Run, tmp_path: Path) -> tuple[Path, Path]:
    """-> (a copy of the run that looks for its data where they are not, a copy of the data)."""
    run = Path(shutil.copytree(colour_run.folder, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    data = Path(shutil.copytree(config["data"]["source"], tmp_path / "copied"))
    config["data"]["source"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    return run, data


def test_data_that_moved_are_named_and_compared(
    moved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = moved
    flags = [str(run), "--target", "fused", "--out", str(tmp_path / "out")]
    assert run_command(main, flags) == 2
    said = capsys.readouterr().err
    assert "--data" in said
    assert "--reference-only" in said
    assert run_command(main, [*flags, "--data", str(data)]) == 0
    assert run_command(verify, [str(tmp_path / "out" / "fused")]) == 0
    capsys.readouterr()

    # images that were added since: those held out now were trained on then
    for index in range(9):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(data / "train" / "amber" / f"more{index}.png")
    assert run_command(main, [*flags, "--data", str(data)]) == 1
    said = capsys.readouterr().err
    assert "copied is not what" in said
    assert "train/amber/more0.png is new" in said
    assert "and 4 more" in said


def test_a_run_is_exported_by_the_stored_images_alone(
    moved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For data that may not leave the machine that trained on them; the bundle says so."""
    run, data = moved
    shutil.rmtree(data)
    flags = [str(run), "--target", "fused", "--out", str(tmp_path / "out"), "--reference-only"]
    assert run_command(main, flags) == 0
    manifest = load_bundle(tmp_path / "out" / "fused").manifest
    (variant,) = manifest.variants
    assert variant.accuracy is not None
    assert (variant.accuracy.split, variant.accuracy.n) == ("reference", 72)
    assert manifest.calibration is not None
    assert manifest.calibration.temperature == 1.0
    assert "by the images that training stored alone" in manifest.calibration.note
    card = (tmp_path / "out" / "fused" / "README.md").read_text()
    assert "softmax(logits): exported by the images that training stored alone" in card
    assert "fitted on 0" not in card
    assert run_command(verify, [str(tmp_path / "out" / "fused")]) == 0
    for more in (["--precision", "int8"], ["--data", str(tmp_path)]):
        capsys.readouterr()
        assert run_command(main, [*flags, *more]) == 2
        assert "--reference-only exports without the run's data" in capsys.readouterr().err


def of_run(bundle: Bundle, run: str) -> Bundle:
    source = msgspec.structs.replace(bundle.manifest.source, run=run)
    return Bundle(bundle.folder, msgspec.structs.replace(bundle.manifest, source=source))


def test_another_runs_model_is_never_replaced(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """In Triton's repository a second run became version 2 of the first one's model, or deleted it."""
    repository = tmp_path / "models"
    flowers = of_run(make_bundle(tmp_path / "a", variants=("fp32", "int8")), "flowers")
    cars = of_run(make_bundle(tmp_path / "b", classes=("bmw", "vw"), seed=1), "cars")
    write_repository(flowers, repository)
    with pytest.raises(UsageError, match=r"fused is of the run flowers; .* --name cars"):
        write_repository(cars, repository)
    models = write_repository(cars, repository, "cars")
    assert [model.name for model in models] == ["cars"]
    assert sorted(model.name for model in repository.iterdir()) == ["cars", "fused", "fused-int8"]
    assert (repository / "fused" / "1" / "model.onnx").is_file()
    again = of_run(make_bundle(tmp_path / "c", seed=2), "flowers")
    write_repository(again, repository)
    assert sorted(path.name for path in (repository / "fused").iterdir() if path.is_dir()) == ["1", "2"]
    # `cars-wash` only begins like `cars`; `cars-int8` would be one of its own
    write_repository(of_run(make_bundle(tmp_path / "d", seed=3), "wash"), repository, "cars-wash")
    write_repository(of_run(cars, "cars"), repository, "cars")
    shutil.rmtree(repository / "fused")
    with pytest.raises(UsageError, match="fused-int8 is of the run flowers"):
        write_repository(cars, repository)


def test_names_of_models() -> None:
    assert model_names(["fused", "branch0"], None) == {"fused": "fused", "branch0": "branch0"}
    assert model_names(["fused"], "cars") == {"fused": "cars"}
    assert model_names(["fused", "branch0"], "cars") == {"fused": "cars-fused", "branch0": "cars-branch0"}
    for name in ("", "a/b", "..", ".hidden", "a b"):
        with pytest.raises(UsageError, match="--name"):
            model_names(["fused"], name)
