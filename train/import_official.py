"""`python -m train.import_official`: checkpoints
of FFL's official code -> a run directory that ffl-export takes.

That code (Jangho-Kim/FFL-pytorch) leaves two files an epoch: Model_N.pth, two CIFAR ResNets that share all
but their last stage, and Module_N.pth, the fusion module. They are read without executing anything from them,
checked name by name and shape by shape, and evaluated anew, since the official log is not kept with them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ffl_deploy.command import Parser, run_command
from ffl_deploy.errors import UsageError
from ffl_deploy.files import replace_folder, sha256_of, write_json
from ffl_deploy.run_directory import CONFIG, SUMMARY
from train.config import DataOptions, MachineOptions, ModelOptions
from train.recipes import RECIPES

if TYPE_CHECKING:
    from torch import Tensor

# Official prefix -> this project's, as regular expressions;
# what follows the prefix has the same name in both.
_MODEL = {
    r"conv1\.": "trunk.0.0.",
    r"bn1\.": "trunk.0.1.",
    r"layer([12])\.": r"trunk.\1.",
    r"layer3_1\.": "branches.0.0.",
    r"layer3_2\.": "branches.1.0.",
    r"classfier3_1\.": "heads.0.",  # the official spelling
    r"classfier3_2\.": "heads.1.",
}
_MODULE = {
    r"conv1\.": "fusion.depthwise.",
    r"bn1\.": "fusion.bn1.",
    r"conv1_1\.": "fusion.pointwise.",
    r"bn1_1\.": "fusion.bn2.",
    r"fc2\.": "fusion.classifier.",
}
IMAGE_SIZE = 32  # the official fusion module averages over maps of 8x8


class OfficialWeights(NamedTuple):
    """What the two files hold, under this project's names."""

    tensors: dict[str, Tensor]
    backbone: str
    classes: int
    epochs: int  # completed ones; 0 where the files do not say


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    parser = Parser(
        prog="python -m train.import_official",
        description="Turn a pair of checkpoints of FFL's official code into a run that ffl-export takes.",
        examples=(
            "python -m train.import_official Model_299.pth Module_299.pth --out runs/official",
            "python -m train.import_official Model_299.pth Module_299.pth --out runs/mine --data photos",
        ),
    )
    parser.add_argument("model", type=Path, metavar="Model_N.pth", help="the two branches")
    parser.add_argument(
        "module", type=Path, metavar="Module_N.pth", help="the fusion module of the same epoch"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="runs/NAME", help="run directory to create"
    )
    parser.add_argument(
        "--data", default="cifar100", metavar="cifar10|cifar100|DIR",
        help=(
            "the images that it was trained on, to test it and to store reference logits for export "
            "(default: cifar100)"
        ),
    )  # fmt: skip
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="where CIFAR's own files lie (default: data)"
    )
    arguments = parser.parse_args(argv)
    accuracy = import_official(
        arguments.model, arguments.module, arguments.out, arguments.data, arguments.data_root
    )
    rows = [f"  {name:<10}{100 * value:6.2f} %" for name, value in accuracy.items()]
    print("\n".join(["test accuracy:", *rows, f"next: ffl-export {arguments.out} --target all"]))
    return 0


def import_official(
    model: Path, module: Path, out: Path, data_source: str = "cifar100", data_root: Path | None = None
) -> dict[str, float]:
    """Write the run directory `out`, complete or not at all; -> test accuracy (0..1) of each classifier.

    model, module: Model_N.pth and Module_N.pth; data_source, data_root: as --data and --data-root of
    training. Raises UsageError for files that are something else and for data with other classes, CheckError
    for weights that do not fit the network.
    """
    import torch

    from ffl_deploy.data.datasets import CIFAR_STATISTICS, load_data
    from ffl_deploy.networks.checkpoint import MODEL, load_weights, save_checkpoint
    from ffl_deploy.networks.mutual import MutualNetwork
    from train.build import choose_network, make_batches
    from train.finish import describe, finish
    from train.machine import Place
    from train.methods import build_method
    from train.options import data_spec
    from train.state import Position

    if out.exists():
        raise UsageError(f"{out} exists already; choose another --out.")
    weights = read_official(model, module)
    config = replace(
        RECIPES["cifar100-resnet32-paper"],  # what the official code trains by, whatever the depth
        recipe=None,
        data=DataOptions(source=data_source, root=data_root, image_size=IMAGE_SIZE),
        model=ModelOptions(method="ffl", branches=(weights.backbone, weights.backbone)),
        machine=MachineOptions(device="cpu", precision="fp32"),
    )
    # The official normalisation belongs to the weights, whatever the data's own statistics.
    mean, std = CIFAR_STATISTICS
    data = replace(load_data(data_spec(config)), mean=mean, std=std)
    if len(data.classes) != weights.classes:
        raise UsageError(
            f"{model} tells {weights.classes} classes apart, but --data {data_source} has "
            f"{len(data.classes)}; "
            "give the data that it was trained on."
        )
    method, place = build_method("ffl"), Place(torch.device("cpu"), "fp32")
    architecture = choose_network(config, method, data)
    network = MutualNetwork(architecture)
    load_weights(network, weights.tensors, f"{model} with {module}")

    description = describe(config, data, architecture, method, place)
    for path in (model, module):
        description.toolchain[f"imported {path.name}"] = f"sha256:{sha256_of(path)}"
    description.split["note"] = "FFL's official code trains on the validation images too"
    position = Position(epoch=weights.epochs, best_epoch=weights.epochs)
    with replace_folder(out) as folder:
        write_json(folder / CONFIG, description)
        save_checkpoint(folder / "checkpoints" / "best", {MODEL: network.state_dict()}, vars(position))
        finish(folder, network, make_batches(config, data, place), data, place, position)
    return msgspec.json.decode((out / SUMMARY).read_bytes())["accuracy"]


def read_official(model: Path, module: Path) -> OfficialWeights:
    """Read the two files and rename what they hold. Raises UsageError."""
    official, epoch = _read(model)
    fusion, other = _read(module)
    if -1 not in (epoch, other) and epoch != other:
        raise UsageError(
            f"{model} is of epoch {epoch} and {module} of epoch {other}; give the two files of one epoch."
        )
    if "classfier3_1.weight" not in official:
        hint = (
            " (it looks like the fusion module: give Model_N.pth first)" if "fc2.weight" in official else ""
        )
        raise UsageError(
            f"{model} is no FFL model of the official code: it has no classfier3_1.weight{hint}."
        )
    if "fc2.weight" not in fusion:
        raise UsageError(f"{module} is no fusion module of the official code: it has no fc2.weight.")
    blocks = {int(found[1]) for name in official if (found := re.match(r"layer1\.(\d+)\.", name))}
    return OfficialWeights(
        tensors=_renamed(official, _MODEL, model) | _renamed(fusion, _MODULE, module),
        backbone=f"resnet{6 * len(blocks) + 2}",
        classes=len(official["classfier3_1.weight"]),
        epochs=epoch + 1,
    )


def _read(path: Path) -> tuple[dict[str, Tensor], int]:
    """-> (state_dict, number of the epoch, -1 where there is none)."""
    import torch

    from train.weights import plain_numbers

    if not path.is_file():
        raise UsageError(
            f"there is no file {path}; give the Model_N.pth and Module_N.pth that the official code saved."
        )
    try:
        with torch.serialization.safe_globals(plain_numbers()):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of any other kind fails in a way of its own
        raise UsageError(
            f"{path} is not a checkpoint that can be read without executing code from it; save its "
            "state_dict alone: torch.save({'state_dict': model.state_dict(), 'epoch': N}, FILE)."
        ) from error
    epoch = content.get("epoch", -1) if isinstance(content, dict) else -1
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in tensors.values()
    ):
        raise UsageError(f"{path} holds no state_dict; give a file that the official code saved.")
    return without_prefix(tensors), epoch if isinstance(epoch, int) else -1


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """-> the tensors by the names that they have without DataParallel, which calls all of them
    module.NAME."""
    if tensors and all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return dict(tensors)


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        for pattern, new in names.items():
            if found := re.match(pattern, name):
                renamed[found.expand(new) + name[found.end() :]] = value
                break
        else:
            raise UsageError(f"{path} has a weight {name!r} that FFL's official network does not have.")
    return renamed


if __name__ == "__main__":
    sys.exit(run_command(main))
