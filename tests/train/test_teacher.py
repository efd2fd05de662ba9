"""--teacher: a run, a bundle, a file of weights or the moving average, whose answers are learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import train.features
from ffl_deploy.bundle import Bundle
from ffl_deploy.data.datasets import DataSpec, ImageData, load_data
from ffl_deploy.errors import UsageError
from ffl_deploy.networks.mutual import Outputs
from ffl_deploy.run_directory import load_run
from train.branch_weights import write_branch
from train.machine import Place
from train.methods import FFL, Independent, Vanilla
from train.run import main, parse
from train.teacher import TaughtOutputs, open_teacher, order_of, taught

CPU = Place(torch.device("cpu"), "fp32")


def lines(run: Path) -> list[dict[str, dict[str, float]]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_teacher_adds_its_softened_answers_to_the_methods_own_losses() -> None:
    torch.manual_seed(0)
    z = [torch.randn(4, 3, dtype=torch.float64) for _ in range(4)]
    labels = torch.tensor([0, 1, 2, 0])
    outputs = Outputs([z[0], z[1]], z[2], None, [])
    own = FFL().losses(outputs, labels, 0.5)
    parts = taught(FFL(), "kd-teacher", 2.0).losses(TaughtOutputs(outputs, z[3]), labels, 0.5)  # type: ignore[arg-type]
    assert {name: float(parts[name]) for name in own} == {name: float(value) for name, value in own.items()}
    for name, student in (("branch0", z[0]), ("branch1", z[1]), ("fused", z[2])):
        p, q = (functional.softmax(values / 3, dim=1) for values in (student, z[3]))
        wanted = 2 * 9 * float((q * (q / p).log()).sum(dim=1).mean())
        assert float(parts[f"kd-teacher/{name}"]) == pytest.approx(wanted, rel=1e-4)
    assert set(parts) - set(own) == {"kd-teacher/branch0", "kd-teacher/branch1", "kd-teacher/fused"}
    assert taught(Vanilla(), "kd-teacher").strong == "branch0"


def test_every_classifier_with_weights_of_its_own_is_taught() -> None:
    z = [torch.randn(4, 3) for _ in range(5)]
    outputs = Outputs([z[0], z[1]], None, z[2], [], trunk=z[3])
    parts = taught(Independent(), "kd-teacher").losses(
        TaughtOutputs(outputs, z[4]), torch.tensor([0, 1, 2, 0]), 1.0
    )
    own = {name.removeprefix("kd-teacher/") for name in parts if name.startswith("kd-teacher/")}
    assert own == {"gated", "branch0", "branch1", "trunk"}


def test_a_teachers_path_is_kept_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is resumed in another folder than it was begun in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "one.pth").touch()
    for typed, kept in (
        ("lr=0.1", f"{tmp_path}/lr=0.1"),
        ("timm:resnet18=one.pth", f"timm:resnet18={tmp_path}/one.pth"),
        ("nowhere", "nowhere"),
    ):
        assert parse(["--teacher", typed]).model.teacher == kept


@pytest.fixture
def data(hues: Path) -> ImageData:
    return load_data(DataSpec(source=str(hues)))


def normalized(data: ImageData, images: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    return (pixels - mean) / std


def test_a_run_answers_as_it_was_evaluated_whatever_the_student_is_normalised_by(
    train_tiny: Callable[..., Path], data: ImageData
) -> None:
    run = train_tiny("run", "--branches", "resnet8,resnet8")
    images, _, logits = load_run(run).reference("best", "fused")
    student = replace(data, mean=(10.0, 20.0, 30.0), std=(40.0, 50.0, 60.0))
    answers = open_teacher(str(run), student, CPU)(normalized(student, images))
    assert torch.allclose(answers, torch.from_numpy(logits), rtol=1e-3, atol=1e-3)
    # classes in another order
    turned = replace(student, classes=data.classes[::-1])
    answers = open_teacher(str(run), turned, CPU)(normalized(student, images))
    assert torch.allclose(answers, torch.from_numpy(logits[:, ::-1].copy()), rtol=1e-3, atol=1e-3)


def test_a_bundle_answers_through_its_own_session(tiny_bundle: Bundle, data: ImageData) -> None:
    student = replace(data, classes=tuple(tiny_bundle.manifest.classes))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    answers = open_teacher(str(tiny_bundle.folder), student, CPU)(normalized(student, images))
    assert np.allclose(answers.numpy(), tiny_bundle.session().run(images).logits, rtol=1e-4, atol=1e-4)
    smaller = normalized(student, images[:, ::2, ::2])
    assert open_teacher(str(tiny_bundle.folder), student, CPU)(smaller).shape == (3, 3)


def test_a_file_of_weights_answers_as_the_branch_that_it_was(
    train_tiny: Callable[..., Path], data: ImageData, tmp_path: Path
) -> None:
    run = train_tiny("run", "--branches", "resnet8,resnet8")
    write_branch(run, 1, "best", tmp_path / "one.safetensors")
    images, _, logits = load_run(run).reference("best", "branch1")
    teacher = open_teacher(f"resnet8={tmp_path / 'one.safetensors'}", data, CPU)
    assert torch.allclose(teacher(normalized(data, images)), torch.from_numpy(logits), rtol=1e-2, atol=1e-2)
    more = replace(data, classes=(*data.classes, "black"))
    with pytest.raises(UsageError, match=r"--teacher .*one.safetensors has no head for the 4 classes"):
        open_teacher(f"resnet8={tmp_path / 'one.safetensors'}", more, CPU)


def test_other_classes_and_no_teacher_are_one_sentence(data: ImageData) -> None:
    with pytest.raises(UsageError, match=r"tells 2 classes apart, not 'c'; .* the student's 3 and no others"):
        order_of(["a", "b"], ["a", "b", "c"], "x")
    with pytest.raises(UsageError, match="tells 3 classes apart, more than these"):
        order_of(["a", "b", "c"], ["a", "b"], "x")
    assert order_of(["b", "a"], ["a", "b"], "x") == [1, 0]
    with pytest.raises(UsageError, match="there is no such run or bundle"):
        open_teacher("nowhere", data, CPU)
    with pytest.raises(UsageError, match="--teacher ema needs the moving average"):
        main(["--teacher", "ema"])


@pytest.mark.parametrize("freeze", ["0", "2"])
def test_answers_that_are_kept_teach_what_answers_of_each_batch_teach(
    freeze: str, train_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = train_tiny("teacher", "--branches", "resnet14,resnet14", "--epochs", "1")
    flags = ["--method", "vanilla", "--branches", "resnet8", "--crop-padding", "0", "--teacher", str(teacher)]
    flags += ["--freeze", freeze, "--no-flip", "--lr", "0.01"]
    kept = train_tiny("kept", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(train.features, "views_are_few", lambda config: False)
        computed = train_tiny("computed", *flags)
    parts = [[line["parts"]["kd-teacher/branch0"] for line in lines(run)] for run in (kept, computed)]
    assert parts[0] == pytest.approx(parts[1], rel=5e-3)
    assert parts[0][-1] < parts[0][0]


def test_the_moving_average_teaches(train_tiny: Callable[..., Path]) -> None:
    run = train_tiny("run", "--branches", "resnet8,resnet8", "--ema", "0.9", "--teacher", "ema")
    first, last = (line["parts"] for line in lines(run))
    assert {name for name in first if name.startswith("kd-teacher/")} == {
        "kd-teacher/fused",
        "kd-teacher/branch0",
        "kd-teacher/branch1",
    }
    assert 0 < last["kd-teacher/fused"] < 10
    assert parse(["--ema", "0.9", "--teacher", "ema"]).model.teacher == "ema"
