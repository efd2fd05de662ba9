"""Bundles whose run is gone -> a run directory that training can go on from.

    python -m benchmarks.continue_bundle examples/cifar100/fused examples/cifar100/branch0 --data CIFAR100 \
        --recipe cifar100-resnet32-fast --out runs/cifar100

The fp32 files hold the weights with batch normalisation folded in. Each convolution takes its folded weights,
and its batch normalisation is set to the statistics of the convolution's results on training images, scaled
and shifted such that together they compute the same. Not in the files, and therefore fitted here by a
logistic regression on training images: the heads of branches that were not exported. Neither are the
optimiser's state and the curves. The logits of the rebuilt classifiers are compared with those of the files
before anything is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from export.write.onnx_graph import Normalize
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import ImageData, load_data
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import write_json
from ffl_deploy.networks.fusion import pool
from ffl_deploy.networks.mutual import MutualNetwork
from ffl_deploy.networks.targets import build_target, network_path
from ffl_deploy.networks.tracing import trace
from ffl_deploy.parity import PARITY_GATES, judge
from ffl_deploy.parity import compare as compare_logits
from ffl_deploy.run_directory import CONFIG
from train.build import choose_network, make_batches, memory_limit
from train.distributed import World
from train.finish import describe, finish
from train.machine import Place, choose_device
from train.methods import build_method, distill
from train.optimizer import build_optimizer
from train.options import data_spec
from train.run import parse
from train.run_folder import require_new
from train.state import Position, TrainingState

STATISTICS_IMAGES = 2048
HEAD_EPOCHS = 20


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.continue_bundle", description=__doc__.split("\n")[0]
    )
    parser.add_argument("bundles", nargs="+", type=Path, help="bundles of one run")
    parser.add_argument("--out", type=Path, required=True, help="the run directory to write")
    own, flags = parser.parse_known_args(argv)
    config = parse([*flags, "--out", str(own.out)])
    place = Place(choose_device(config.machine, World()), "fp32")
    require_new(own.out)

    # what the bundles were trained with: the recipe says the networks, the data what it looked like
    bundles = [load_bundle(folder) for folder in own.bundles]
    data = load_data(data_spec(config), memory_limit(config))
    if any(list(bundle.classes) != list(data.classes) for bundle in bundles):
        raise UsageError(
            "the bundles have other classes than the data; give the data that they were trained on."
        )
    method = build_method(config.model.method, config.model.temperature)
    architecture = choose_network(config, method, data)
    torch.manual_seed(config.seed)
    network = MutualNetwork(architecture).to(memory_format=torch.channels_last)

    # the weights that the files hold, and those that they do not
    known = fill(network, bundles)
    rows = np.linspace(0, len(data.train) - 1, STATISTICS_IMAGES).astype(np.int64)
    normalize = Normalize(data.mean, data.std)
    set_statistics(network, known, normalize(torch.from_numpy(data.train.read(rows))))
    for bundle in bundles:
        compare(network, bundle, normalize)
    missing = [k for k, _ in enumerate(network.heads) if f"heads.{k}" not in known]
    if missing:
        print(f"fitting the heads of branches {missing}, which no bundle holds", file=sys.stderr, flush=True)
        fit_heads(network, missing, training_images(data, normalize), torch.from_numpy(data.train.labels))

    # a run directory as training leaves it, but for metrics.jsonl and its curves
    position = Position(epoch=max(bundle.manifest.source.epoch for bundle in bundles))
    position.best_epoch = position.epoch
    own.out.mkdir(parents=True, exist_ok=True)
    write_json(own.out / CONFIG, describe(config, data, architecture, method, place))
    state = TrainingState(
        own.out, network, build_optimizer(network, config.optimisation), torch.amp.GradScaler("cpu"), None
    )
    state.save_weights("best", network, position)
    state.save(position)
    finish(own.out, network, make_batches(config, data, place), data, place, position)
    return 0


def fill(network: MutualNetwork, bundles: Sequence[Bundle]) -> dict[str, Tensor]:
    """Load the folded weights; -> path of each layer that was found -> its bias.
    Raises CheckError for other shapes."""
    import onnx
    from onnx import numpy_helper

    biases: dict[str, Tensor] = {}
    for bundle in bundles:
        graph = onnx.load(bundle.folder / "model.onnx").graph
        values = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
            for tensor in graph.initializer
        }
        for node in graph.node:
            if node.op_type not in ("Conv", "Gemm"):
                continue
            path = network_path(bundle.manifest.target, node.input[1].removesuffix(".weight"))
            layer, weight = network.get_submodule(path), values[node.input[1]]
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            if layer.weight.shape != weight.shape:
                raise CheckError(
                    f"{path} has another shape in {bundle.folder} than in this recipe's network."
                )
            with torch.no_grad():
                layer.weight.copy_(weight)
                biases[path] = values[node.input[2]]
                if isinstance(layer, nn.Linear):
                    layer.bias.copy_(biases[path])
    return biases


@torch.no_grad()
def set_statistics(network: MutualNetwork, biases: dict[str, Tensor], normalized: Tensor) -> None:
    """Set each batch normalisation to the statistics of its input on `normalized` [n, 3, h, w],
    and to add the bias.

    Layer after layer, since what comes before must be right first.
    """
    folded = {path: norm for path, norm in trace(network).layers.values() if norm is not None}

    def measure(path: str, norm: nn.BatchNorm2d) -> RemovableHandle:
        def hook(_: nn.Module, __: object, values: Tensor) -> None:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            variance, mean = torch.var_mean(values.double(), dim=(0, 2, 3))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.weight.copy_((variance.float() + norm.eps).sqrt())
            norm.bias.copy_(biases[path] + norm.running_mean)

        return network.get_submodule(path).register_forward_hook(hook)

    handles = [measure(path, norm) for path, norm in folded.items()]
    network.eval()(normalized)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def compare(network: MutualNetwork, bundle: Bundle, normalize: Normalize) -> None:
    """Raise CheckError where the rebuilt classifier does not give the logits
    of the bundle's golden samples."""
    golden = bundle.golden()
    logits = build_target(network, bundle.manifest.target)(normalize(torch.from_numpy(golden.images))).numpy()
    verdict = judge({"all": compare_logits(golden.logits, logits)}, PARITY_GATES["fp32"])
    if verdict.failed:
        raise CheckError(
            f"{bundle.folder} was not rebuilt as it was ({verdict.findings[0]}); is this its recipe, and "
            "its data?"
        )


def fit_heads(
    network: MutualNetwork, numbers: Sequence[int], batches: Iterable[Tensor], labels: Tensor
) -> None:
    """Fit heads to the true labels and to the fused logits of the training images,
    on their branches' pooled features."""
    network.eval()
    pooled: list[list[Tensor]] = [[] for _ in numbers]
    fused: list[Tensor] = []
    with torch.inference_mode():
        for images in batches:
            outputs = network(images)
            fused.append(outputs.fused)
            for kept, number in zip(pooled, numbers, strict=True):
                kept.append(pool(outputs.features[number]))
    teacher = torch.cat(fused).clone()
    for kept, number in zip(pooled, numbers, strict=True):
        head, features = network.heads[number], torch.cat(kept).clone()
        optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, HEAD_EPOCHS)
        order = torch.Generator().manual_seed(0)
        for _ in range(HEAD_EPOCHS):
            for rows in torch.randperm(len(labels), generator=order).split(512):
                logits = head(features[rows])
                loss = functional.cross_entropy(logits, labels[rows]) + distill(logits, teacher[rows], 3.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()


def training_images(data: ImageData, normalize: Normalize) -> Iterator[Tensor]:
    """-> normalised [n, 3, h, w] of all training images as they are, in order."""
    for start in range(0, len(data.train), 500):
        yield normalize(torch.from_numpy(data.train.read(slice(start, start + 500)))).contiguous(
            memory_format=torch.channels_last
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
