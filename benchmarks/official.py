"""The two sides of a comparison with the official FFL code, on the same images and by the same recipe.

The official one runs as it is: its own networks, losses, data pipeline and training function,
from a clone of it.

Nothing of it is copied here. Two things are put in its place: the device (it calls .cuda()), and where
CIFAR-100 comes from (it downloads to ~/data). torchvision's CIFAR100 is replaced by the same images from a
folder, handed over as PIL images like there. One line of its script is left out, cudnn.deterministic: on a
GPU cuDNN may then take a faster algorithm, which is to the official side's advantage; a CPU has no such
choice.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import time
import types
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image

from ffl_deploy.data.datasets import ArraySplit, DataSpec, ImageData, Split, load_data
from ffl_deploy.errors import UsageError
from ffl_deploy.networks.mutual import MutualNetwork
from train.build import choose_network, make_batches
from train.config import TrainConfig
from train.data.batches import Batches
from train.distributed import World
from train.loop import Trainer
from train.machine import Place, choose_device, choose_place
from train.methods import Method, build_method
from train.precision import fastest_precision
from train.randomness import seed_everything
from train.recipes import RECIPES
from train.stopping import StopRequest

FILES = ("our_network.py", "utils.py", "train_FFL.py")
RECIPE = "cifar100-resnet32-paper"


class Cifar100(torch.utils.data.Dataset):
    """Stands in for torchvision.datasets.CIFAR100: uint8 images in memory,
    each made a PIL image and transformed on access."""

    images: dict[bool, np.ndarray]
    labels: dict[bool, np.ndarray]

    def __init__(self, root: str, train: bool = True, download: bool = False, transform: Any = None) -> None:
        self.train, self.transform = train, transform

    def __len__(self) -> int:
        return len(self.labels[self.train])

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[self.train][index])), int(
            self.labels[self.train][index]
        )


def cifar_images(folder: Path, images: int | None = None) -> ImageData:
    """folder: CIFAR-100 as train/CLASS/* and test/CLASS/*; images: how many for training,
    equally many of each class.

    -> the data that both sides take, a tenth of the training images held out.
    """
    data = load_data(DataSpec(source=str(folder.absolute())))
    if images is None:
        return data
    return dataclasses.replace(
        data,
        train=first_of_each(data.train, images // 100),
        validation=first_of_each(data.validation, images // 1000),
    )


def first_of_each(split: Split, count: int) -> ArraySplit:
    """-> the first `count` images of each of the 100 classes, in the split's order."""
    rows = np.sort(np.concatenate([np.flatnonzero(split.labels == k)[: max(1, count)] for k in range(100)]))
    return ArraySplit(split.read(slice(None))[rows], split.labels[rows])


def official_training(
    clone: Path, data: ImageData, device: torch.device, seed: int, ramp_up: float = 80.0
) -> Any:
    """Set the official training up, as its script does with its defaults; ramp_up: its --consistency_rampup,
    in epochs.

    clone: a working tree of Jangho-Kim/FFL-pytorch.
    -> a namespace of network, module, optimizers, trainloader, testloader and run(batches, epoch),
    which is its `train`.
    """
    missing = [name for name in FILES if not (clone / name).is_file()]
    if missing:
        raise UsageError(f"{clone} is no clone of Jangho-Kim/FFL-pytorch: it has no {', '.join(missing)}.")
    Cifar100.images = {True: data.train.read(slice(None)), False: data.test.read(slice(None))}
    Cifar100.labels = {True: data.train.labels, False: data.test.labels}
    torchvision.datasets.CIFAR100 = Cifar100
    if device.type == "cpu":
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    utils, networks = module_of(clone, "utils"), module_of(clone, "our_network")

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that four workers are many for this machine
        trainloader, _, testloader = utils.get_cifar100_dataloaders(128, 100)
    model = networks.ffl_resnet(num_classes=100, depth=32).to(device)
    module = networks.Fusion_module(64, 100, 8).to(device)
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    names = {
        "torch": torch,
        "time": time,
        "utils": utils,
        "DEVICE": device,
        "args": types.SimpleNamespace(consistency_rampup=ramp_up),
        "optimizer": torch.optim.SGD(model.parameters(), weight_decay=1e-4, **settings),
        "optimizer_FM": torch.optim.SGD(module.parameters(), weight_decay=1e-5, **settings),
        "criterion_CE": torch.nn.CrossEntropyLoss(),
        "criterion_kl": utils.KLLoss(),
        "print": lambda *_: None,
    }
    functions(clone / "train_FFL.py", ["train", "get_current_consistency_weight"], names)

    def run(batches: Iterable[Any], epoch: int) -> Any:
        names["trainloader"] = batches
        return names["train"](model, module, epoch)

    return types.SimpleNamespace(
        network=model,
        module=module,
        optimizers=[names["optimizer"], names["optimizer_FM"]],
        trainloader=trainloader,
        testloader=testloader,
        run=run,
    )


class OurTraining(NamedTuple):
    """What `Trainer` takes, in its order."""

    network: MutualNetwork
    method: Method
    batches: Batches
    config: TrainConfig
    place: Place

    def fit(self, folder: Path) -> None:
        Trainer(*self, folder, StopRequest()).run()


def our_training(data: ImageData, device: str, seed: int, **optimisation: Any) -> OurTraining:
    """-> this project's training by the paper's recipe, which is the official code's;
    `optimisation` replaces parts of it."""
    recipe = RECIPES[RECIPE]
    config = dataclasses.replace(
        recipe,
        seed=seed,
        optimisation=dataclasses.replace(recipe.optimisation, **optimisation),
        machine=dataclasses.replace(recipe.machine, device="cuda" if device == "cuda" else "cpu"),
        output=dataclasses.replace(recipe.output, quiet=True, checkpoint_minutes=1e9),
    )
    chosen, method = choose_device(config.machine, World()), build_method("ffl")
    seed_everything(seed, "weights")
    network = (
        MutualNetwork(choose_network(config, method, data)).to(chosen).to(memory_format=torch.channels_last)
    )
    place = choose_place("auto", chosen, World(), partial(fastest_precision, network, method, config))
    return OurTraining(network, method, make_batches(config, data, place), config, place)


def module_of(clone: Path, name: str) -> types.ModuleType:
    """-> module `name` of the clone, imported from its file."""
    spec = importlib.util.spec_from_file_location(f"official_{name}", clone / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions(script: Path, wanted: list[str], names: dict[str, Any]) -> None:
    """Define the functions `wanted` of `script` in `names`: the script itself cannot be imported,
    it would start to train."""
    tree = ast.parse(script.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    if len(tree.body) != len(wanted):
        raise UsageError(
            f"{script} does not define {' and '.join(wanted)}: this is another version of the official code."
        )
    exec(compile(tree, str(script), "exec"), names)


def endless(loader: Iterable[Any], steps: int) -> Iterator[Any]:
    """-> `steps` batches of `loader`, starting over where it ends."""
    while True:
        for batch in loader:
            if steps == 0:
                return
            steps -= 1
            yield batch
