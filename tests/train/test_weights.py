"""--weights: what a file may look like, what is loaded of it, and what is refused, in one sentence."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from ffl_deploy.run_directory import load_run
from train.branch_weights import write_branch
from train.looks import as_weights_want, doubts
from train.run import parse
from train.weights import start_from

RESNET = "torchvision:resnet18"


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """What a library publishes: a ResNet-18 of 1,000 classes whose every tensor is another one."""
    torch.manual_seed(7)
    state = torchvision.models.resnet18().state_dict()
    return {k: v * (1 + 0.1 * torch.rand_like(v)) if v.is_floating_point() else v for k, v in state.items()}


def network(*branches: str, classes: int = 3) -> MutualNetwork:
    return MutualNetwork(NetworkConfig(branches, classes, 32, 32))


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda tensors: tensors,
    "ordered": OrderedDict,
    "state_dict": lambda tensors: {"state_dict": tensors, "epoch": 3},
    "model": lambda tensors: {"model": tensors, "optimizer": {"lr": 0.1}},
    "module.": lambda tensors: {f"module.{key}": value for key, value in tensors.items()},
    "compiled": lambda tensors: {f"module._orig_mod.{key}": value for key, value in tensors.items()},
    "compiled first": lambda tensors: {f"_orig_mod.module.{key}": value for key, value in tensors.items()},
    "wrapped module.": lambda tensors: {"state_dict": {f"module.{k}": v for k, v in tensors.items()}},
    "numpy": lambda tensors: {"state_dict": tensors, "best_prec1": np.float64(71.5), "epoch": np.int64(3)},
    "no counters": lambda tensors: {k: v for k, v in tensors.items() if "num_batches" not in k},
    "without a head": lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("fc.")},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_usual_form_of_a_file_gives_the_same_features(
    form: str, published: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save(tmp_path / "weights.pth", FORMS[form](published))
    net = network(RESNET, "resnet8")
    head = net.heads[0].weight.clone()
    (report,) = start_from(net, [f"branch0={path}"])
    model = torchvision.models.resnet18()
    model.load_state_dict(published)
    model.avgpool, model.fc = torch.nn.Identity(), torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        features = net.eval()(images).features[0]
        wanted = model.eval()(images).view(features.shape)
    assert torch.allclose(features, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert torch.equal(net.heads[0].weight, head)
    assert report.loaded == (100 if form == "no counters" else 120)
    if form != "without a head":
        assert str(report).endswith(
            "not taken: fc.weight, fc.bias (the head of 1,000 classes; 3 are learned anew)"
        )


def test_a_head_of_the_same_classes_is_taken(published: dict[str, Tensor], tmp_path: Path) -> None:
    own = published | {"fc.weight": torch.rand(3, 512), "fc.bias": torch.rand(3)}
    save_file(own, tmp_path / "own.safetensors")
    net = network(RESNET, "resnet8")
    (report,) = start_from(net, [f"branch0={tmp_path / 'own.safetensors'}"])
    assert torch.equal(net.heads[0].weight, own["fc.weight"])
    assert (report.loaded, report.left) == (122, {})


@pytest.mark.parametrize("part", ["_net", "trunk", "trunk.stages", "branches", "heads"])
def test_names_of_another_library_are_taken_in_order(
    part: str, published: dict[str, Tensor], tmp_path: Path
) -> None:
    """Whether or not they begin as this project's own do."""
    renamed = {f"{part}.x{n}.{key.rpartition('.')[2]}": v for n, (key, v) in enumerate(published.items())}
    net = network(RESNET, "resnet8")
    (report,) = start_from(net, [f"branch0={save(tmp_path / 'w.pth', renamed)}"])
    assert "taken in order" in str(report)
    assert torch.equal(net.branches[0][0][0].weight, published["conv1.weight"])


def test_of_branches_that_share_stages_the_first_one_gives_them(
    published: dict[str, Tensor], tmp_path: Path
) -> None:
    other = {k: v + 1 if v.is_floating_point() else v for k, v in published.items()}
    first, second = save(tmp_path / "a.pth", published), save(tmp_path / "b.pth", other)
    net = network(RESNET, RESNET)
    start_from(net, [f"branch0={first}", f"branch1={second}"])
    assert torch.equal(net.trunk[0][0].weight, published["conv1.weight"])
    for branch, tensors in enumerate((published, other)):
        own = net.branches[branch].state_dict()
        assert torch.equal(next(iter(own.values())), tensors["layer4.0.conv1.weight"])


def spoil_missing(tensors: dict[str, Tensor]) -> Any:
    return {key: value for key, value in tensors.items() if key != "layer2.0.bn1.weight"}


class Runs:
    """A pickle that wants a command executed."""

    def __reduce__(self) -> Any:
        import os

        return os.system, ("echo executed > executed",)


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (spoil_missing, "does not fit torchvision:resnet18: layer2.0.bn1.weight is missing"),
    "extra": (
        lambda tensors: tensors | {"layer5.weight": torch.ones(2)},
        "does not fit torchvision:resnet18: layer5.weight has no place there",
    ),
    "shape": (
        lambda tensors: tensors | {"conv1.weight": torch.ones(64, 3, 3, 3)},
        r"conv1.weight is \(64, 3, 3, 3\) instead of \(64, 3, 7, 7\)",
    ),
    "other names": (
        lambda tensors: torchvision.models.mobilenet_v3_small().state_dict(),
        "belongs to another architecture than torchvision:resnet18",
    ),
    "other depth": (
        lambda tensors: torchvision.models.resnet34().state_dict(),
        "(does not fit|belongs to another architecture than) torchvision:resnet18",
    ),
    "own names without a branch": (
        lambda tensors: {"trunk.0.weight": tensors["conv1.weight"]},
        "holds no branch of a network",
    ),
    "code": (lambda tensors: {"state_dict": tensors, "x": Runs()}, "asks for code to be executed .*system"),
    "nothing": (lambda tensors: {"epoch": 3}, "holds no state_dict"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_one_sentence_and_changes_nothing(
    kind: str, published: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, sentence = BAD[kind]
    path = save(tmp_path / "weights.pth", make(published))
    net = network(RESNET, "resnet8")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UsageError, match=sentence) as raised:
        start_from(net, [f"branch0={path}"])
    assert "\n" not in str(raised.value)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not (tmp_path / "executed").exists()


def test_a_folder_is_a_run_or_holds_a_file_of_weights(published: dict[str, Tensor], tmp_path: Path) -> None:
    """As huggingface_hub keeps a model: its config.json is none of a run's."""
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    net = network(RESNET, "resnet8")
    with pytest.raises(UsageError, match="is a folder, and neither a run nor a checkpoint"):
        start_from(net, [f"branch0={tmp_path}"])
    save_file(published, tmp_path / "model.safetensors")
    (report,) = start_from(net, [f"branch0={tmp_path}"])
    assert report.loaded == 120
    config = parse(["--branches", f"{RESNET},resnet8", "--weights", f"branch0={tmp_path}"])
    assert as_weights_want(config).data.image_size == (224, 224)


def test_damaged_files_are_no_traceback(tmp_path: Path) -> None:
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 no such thing")
        with pytest.raises(UsageError, match="or a damaged one"):
            start_from(network(RESNET, "resnet8"), [f"branch0={tmp_path / name}"])


def test_a_wrong_place_or_branch_is_said(published: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(tmp_path / "weights.pth", published)
    with pytest.raises(UsageError, match=r"there is no file .*Did you mean .*weights.pth"):
        start_from(network(RESNET, "resnet8"), [f"branch0={tmp_path / 'weight.pth'}"])
    with pytest.raises(UsageError, match="there are branches 0 to 1"):
        start_from(network(RESNET, "resnet8"), [f"branch2={path}"])
    with pytest.raises(UsageError, match="two files for branch0"):
        start_from(network(RESNET, "resnet8"), [str(path), f"branch0={path}"])


def test_a_file_that_does_not_fit_leaves_no_run_behind(
    published: dict[str, Tensor], hues: Path, tmp_path: Path
) -> None:
    path = save(tmp_path / "weights.pth", spoil_missing(published))
    command = [sys.executable, "-m", "train.run", "--data", str(hues), "--out", str(tmp_path / "run")]
    command += ["--branches", f"{RESNET},resnet8", "--weights", f"branch0={path}", "--image-size", "32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "layer2.0.bn1.weight is missing" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_and_its_plain_weights_start_another_run(
    train_tiny: Callable[..., Path], tmp_path: Path, hues: Path
) -> None:
    first = train_tiny("first", "--branches", "resnet8,resnet8")
    write_branch(first, 1, "best", tmp_path / "branch1.safetensors")
    stored = load_run(first)
    # a run: of branch 0 trunk and branch; its file for branch 1
    config = parse(["--data", str(hues), "--branches", "resnet8,resnet8", "--weights", str(first)])
    wanted = as_weights_want(config)
    assert wanted.data.image_size == (stored.preprocessing.width, stored.preprocessing.height)
    assert [round(255 * value, 3) for value in wanted.data.mean] == pytest.approx(stored.mean, abs=1e-3)
    net = network("resnet8", "resnet8")
    (report0, report1) = start_from(net, [f"branch0={first}", f"branch1={tmp_path / 'branch1.safetensors'}"])
    from ffl_deploy.networks.checkpoint import load_network

    trained = load_network(stored).network.state_dict()
    own = net.state_dict()
    assert all(torch.equal(own[k], v) for k, v in trained.items() if not k.startswith("fusion."))
    assert report0.note == "branch0 of that run"
    assert report1.left == {}


def test_every_form_of_a_run_says_what_its_images_look_like(
    train_tiny: Callable[..., Path], tmp_path: Path, hues: Path
) -> None:
    run = train_tiny(
        "run", "--branches", "resnet8,resnet8", "--interpolation", "box", "--crop-fraction", "0.9"
    )
    how = load_run(run)
    write_branch(run, 1, "best", tmp_path / "one.safetensors")
    checkpoint = run / "checkpoints" / "best"
    for source in (run, checkpoint, checkpoint / "model.safetensors", tmp_path / "one.safetensors"):
        # of the second branch alone, where the first one starts from nothing
        config = parse(
            ["--data", str(hues), "--branches", "resnet8,resnet8", "--weights", f"branch1={source}"]
        )
        data = as_weights_want(config).data
        assert data.image_size == (how.preprocessing.width, how.preprocessing.height)
        assert (data.interpolation, data.crop_fraction) == ("box", 0.9)
        assert [255 * value for value in data.mean] == pytest.approx(how.mean, abs=1e-3)


def test_what_a_start_leaves_doubtful_is_said(published: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(tmp_path / "weights.pth", published)

    def said(*flags: str, shared: int = 0) -> list[str]:
        return doubts(as_weights_want(parse([*flags])), shared)

    # weights of two kinds
    both = ["--branches", f"timm:tf_efficientnet_lite0,{RESNET}", "--pretrained"]
    (line,) = said(*both)
    assert line.startswith(
        "branch1 starts from weights that were trained with pixels of mean 0.485 0.456 0.406"
    )
    assert "and gets 0.5 0.5 0.5" in line
    assert said("--pretrained") == []

    # stages that are frozen before they have learned anything
    one = ["--branches", f"{RESNET},resnet8", "--weights", f"branch0={path}"]
    (line,) = said(*one)
    assert line.startswith("branch1 (resnet8) starts from nothing, and --freeze 2 keeps")
    assert said(*one, "--freeze", "0") == []
    twins = ["--branches", f"{RESNET},{RESNET}", "--weights", f"branch0={path}"]
    assert said(*twins, shared=4) == [], "frozen are the stages of the first branch, which both share"
    assert len(said(*twins, "--freeze", "5", shared=4)) == 1


def test_size_and_normalisation_follow_the_weights_unless_told_otherwise(hues: Path, tmp_path: Path) -> None:
    flags = ["--data", str(hues), "--branches", "timm:tf_efficientnet_lite0,resnet8", "--pretrained"]
    data = as_weights_want(parse(flags)).data
    assert (data.image_size, data.interpolation, data.crop_fraction) == ((224, 224), "bicubic", 0.875)
    assert (data.mean, data.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    told = [
        *flags,
        "--image-size",
        "96",
        "--interpolation",
        "box",
        "--mean",
        "0",
        "0",
        "0",
        "--std",
        "1",
        "1",
        "1",
    ]
    data = as_weights_want(parse([*told, "--crop-fraction", "1"])).data
    assert (data.image_size, data.interpolation, data.crop_fraction) == (96, "box", 1.0)
    assert (data.mean, data.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    resnet = as_weights_want(parse(["--branches", f"{RESNET},resnet8", "--pretrained"])).data
    assert (resnet.image_size, resnet.crop_fraction) == ((224, 224), 0.875)
    assert as_weights_want(parse(["--data", str(hues)])).data.mean == ()
