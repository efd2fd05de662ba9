"""The typed configuration of a training run; the flags and their help are derived from it (run.py). No torch here.

Each group is a frozen dataclass; the docstring under a field is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg


def split_names(text: str) -> tuple[str, ...]:
    """`a,b` -> ("a", "b")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


# One flag value with commas, as in --branches resnet32,resnet32.
Names = Annotated[
    tuple[str, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="A,B,...",
        instance_from_str=lambda values: split_names(values[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda names: [",".join(names)],
    ),
]
MethodName = Literal[
    "ffl", "ffl-no-ekd", "ffl-no-fkd", "ffl-sum", "ffl-mean",
    "vanilla", "independent", "dml", "one", "cl-ilr", "okddip", "dualnet",
]  # fmt: skip


@dataclass(frozen=True)
class DataOptions:
    """Images and how they are varied."""

    source: Annotated[str, arg(name="data", metavar="digits|cifar10|cifar100|DIR")] = "digits"
    """What to train on: a data set's name, or a folder with train/CLASS/* and test/CLASS/* (or val/)."""
    root: Annotated[Path | None, arg(name="data-root", metavar="DIR")] = None
    """Where CIFAR's own files lie or are downloaded to; data/ if not given."""
    image_size: Annotated[int | None, arg(metavar="PIXELS")] = None
    """Side of the network's input; the data's own (at most 64 for folders) if not given."""
    validation: float = 0.1
    """Share of each class's training images that is held out to choose the best epoch."""
    skip_bad_images: bool = False
    """Leave unreadable images out instead of stopping."""
    augment: Literal["none", "crop", "resized-crop"] = "crop"
    """Training views: the image itself; a random cut after padding; or a random part, resized (ImageNet's)."""
    crop_padding: Annotated[int, arg(metavar="PIXELS")] = 4
    """Border by which `crop` pads, reflected."""
    flip: bool = True
    """Mirror half of the training images (wrong for digits and text)."""
    small_size: Annotated[int | None, arg(metavar="PIXELS")] = None
    """Side of the training images in the first epochs, which then cost less (progressive resizing); off if not given."""
    small_share: float = 0.5
    """Share of the epochs that are trained at --small-size."""
    mixup: Annotated[float, arg(metavar="ALPHA")] = 0.0
    """Beta parameter of mixup (Zhang et al. 2018); 0 is off."""
    cutmix: Annotated[float, arg(metavar="ALPHA")] = 0.0
    """Beta parameter of CutMix (Yun et al. 2019); 0 is off. With both, each batch takes one of them."""


@dataclass(frozen=True)
class ModelOptions:
    """Networks and method."""

    method: MethodName = "ffl"
    """What the networks learn from each other."""
    branches: Names = ("resnet32", "resnet32")
    """One backbone per branch: own names, torchvision:NAME or timm:NAME."""
    shared_stages: int | None = None
    """Low-level stages that branches of one architecture share; what the method and the paper say if not given."""
    fusion_width: int | None = None
    """Output channels N of the fusion module; the first branch's channels if not given."""
    temperature: float | None = None
    """T of the softened distributions; the method's own if not given."""
    ramp_up: float = 80 / 300
    """Share of the epochs over which the distillation terms grow to their full weight."""
    pretrained: bool = False
    """Start torchvision: and timm: backbones from their published weights."""


@dataclass(frozen=True)
class OptimisationOptions:
    """Optimiser and schedule."""

    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 128
    """Images per optimiser step, over all processes and micro-batches together."""
    accumulate: int = 1
    """Micro-batches per step and process: less memory, same step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of SGD (beta1 of AdamW)."""
    weight_decay: float = 1e-4
    """Weight decay of the branches."""
    fusion_weight_decay: float = 1e-5
    """Weight decay of the fusion module."""
    schedule: Literal["multistep", "cosine", "onecycle"] = "onecycle"
    """Learning rate over the run: x0.1 at each milestone; cosine to 0; or linear up, linear down to 0."""
    warmup: float = 0.0
    """Share of the run over which the learning rate first rises linearly."""
    milestones: Annotated[tuple[float, ...], arg(metavar="SHARE")] = (0.5, 0.75)
    """multistep: shares of the epochs after which the learning rate is multiplied by 0.1."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    clip: float = 0.0
    """Largest gradient norm; 0 is off."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the weights (checkpoint `ema`); 0 is off."""


@dataclass(frozen=True)
class MachineOptions:
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the two passes. auto: on a GPU bf16 if it has that, else fp16; on a CPU bf16 if that is faster, else fp32."""
    threads: int | None = None
    """CPU threads of this process; one per core if not given. Part of the result: sums are added in another order."""
    compile: bool = False
    """Compile the network with torch.compile (pays on GPUs, not on CPUs)."""
    sync_batchnorm: bool = False
    """Batch normalisation over all processes (GPUs only)."""
    workers: int | None = None
    """Processes that decode images which do not fit into memory; one per core if not given."""
    memory_limit: Annotated[float | None, arg(metavar="GIB")] = None
    """Largest decoded data set to hold in memory; a quarter of the free memory if not given. Above it, images stream."""


@dataclass(frozen=True)
class OutputOptions:
    """What is left behind."""

    out: Annotated[Path | None, arg(metavar="runs/NAME")] = None
    """Run directory to create; runs/DATA-METHOD-TIME if not given."""
    resume: Annotated[Path | None, arg(metavar="runs/NAME")] = None
    """Continue this run, with the configuration it was started with."""
    checkpoint_minutes: float = 10.0
    """Save at least this often, also in the middle of an epoch."""
    quiet: bool = False
    """No progress; errors only."""


@dataclass(frozen=True)
class TrainConfig:
    """Train networks by mutual distillation; without arguments FFL on scikit-learn's digits, a minute on two cores."""

    recipe: Annotated[str | None, arg(metavar="NAME|list")] = None
    """Named defaults that the other flags override, chosen by --data if not given; `list` prints them all."""
    seed: int = 0
    """Seed of weights, data order and augmentation."""
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
