"""The typed configuration of a training run; the flags and their help are derived from it (flags.py).
No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ffl_deploy.preprocessing import ImageSize
from train.methods import METHODS
from train.trackers import EXTRAS


@dataclass(frozen=True)
class Help:
    """What --help says of an option. flag: its name where it is not the field's; choices:
    where its type does not say them."""

    text: str
    metavar: str | None = None
    flag: str | None = None
    choices: tuple[str, ...] = ()


def split_names(text: str) -> tuple[str, ...]:
    """`a,b` -> ("a", "b")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def option(
    default: Any,
    text: str,
    *,
    metavar: str | None = None,
    flag: str | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """-> the field of an option: its default and its Help."""
    return field(default=default, metadata={"help": Help(text, metavar, flag, choices)})


Names = tuple[str, ...]
"""One flag value with commas, as in --branches resnet32,resnet32."""


@dataclass(frozen=True)
class DataOptions:
    """Images and how they are varied."""

    source: str = option(
        "digits",
        "What to train on: a data set's name; a folder with CLASS/*, or with train/CLASS/* and test/CLASS/*; "
        "or a CSV or Parquet list of images and their labels.",
        metavar="digits|cifar10|cifar100|DIR|LIST",
        flag="data",
    )
    root: Path | None = option(
        None,
        "Where a list's images lie, its own folder if not given; or CIFAR's files, data/ if not given.",
        metavar="DIR",
        flag="data-root",
    )
    column: str | None = option(
        None, "Of a list: the column of paths; path, image, file_name, ... if not given.", metavar="NAME"
    )
    label_column: str | None = option(
        None, "Of a list: the column of classes; label, class or target if not given.", metavar="NAME"
    )
    image_size: ImageSize | None = option(
        None,
        "Side of the network's input, or width and height; the data's own (at most 64 for folders) if not "
        "given.",
        metavar="PIXELS|WxH",
    )
    validation: float = option(
        0.1,
        "Share of each class's training images that is held out to choose the best epoch.",
    )
    calibration_split: float = option(
        0.0,
        (
            "Share of those that chooses no epoch either: on it `ffl-export` calibrates sets, abstention and "
            "thresholds, whose promises need images that chose nothing; 0 is none."
        ),
        metavar="SHARE",
    )
    skip_bad_images: bool = option(False, "Leave unreadable images out instead of stopping.")
    augment: Literal["none", "crop", "resized-crop"] = option(
        "crop",
        (
            "Training views: the image itself; a random cut after padding; or a random part, resized "
            "(ImageNet's)."
        ),
    )
    crop_padding: int = option(4, "Border by which `crop` pads, reflected.", metavar="PIXELS")
    flip: bool = option(True, "Mirror half of the training images (wrong for digits and text).")
    small_size: int | None = option(
        None,
        (
            "Side of the training images in the first epochs, which then cost less (progressive resizing); "
            "off if not given."
        ),
        metavar="PIXELS",
    )
    small_share: float = option(0.5, "Share of the epochs that are trained at --small-size.")
    crop_fraction: float | None = option(
        None,
        "Share of a photograph's shorter side that the network sees; of the weights it starts from, else 1 "
        "below 128 pixels and 0.875 from there on, if not given.",
        metavar="SHARE",
    )
    interpolation: Literal["auto", "box", "bilinear", "bicubic", "lanczos"] = option(
        "auto",
        "How images are resized. auto: as for the weights it starts from, else bilinear.",
    )
    mean: tuple[float, ...] = option(
        (),
        "Mean of red, green and blue, 0 to 1, that is subtracted; of the weights it starts from, else of the "
        "images, if not given.",
        metavar="0..1",
    )
    std: tuple[float, ...] = option(
        (), "Standard deviations that pixels are divided by, as --mean.", metavar="0..1"
    )
    balance: Literal["none", "sampling", "weights"] = option(
        "none",
        "Rare classes count for as much as frequent ones: drawn as often, or each image's loss weighted.",
    )
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = option(
        "none",
        "Change every training view at random, by torchvision: two operations (RandAugment, Cubuk et al. "
        "2020), or one of any strength (TrivialAugment, Müller and Hutter 2021).",
    )
    random_erase: float = option(
        0.0,
        "Share of the training views of which a random rectangle is erased (Zhong et al. 2020).",
        metavar="SHARE",
    )
    mixup: float = option(0.0, "Beta parameter of mixup (Zhang et al. 2018); 0 is off.", metavar="ALPHA")
    cutmix: float = option(
        0.0,
        "Beta parameter of CutMix (Yun et al. 2019); 0 is off. With both, each batch takes one of them.",
        metavar="ALPHA",
    )


@dataclass(frozen=True)
class ModelOptions:
    """Networks and method."""

    method: str = option("ffl", "What the networks learn from each other.", choices=tuple(METHODS))
    branches: Names = option(
        ("resnet32", "resnet32"),
        "One backbone per branch: own names, torchvision:NAME or timm:NAME.",
    )
    shared_stages: int | None = option(
        None,
        (
            "Low-level stages that branches of one architecture share; what the method and the paper say if "
            "not given."
        ),
    )
    trunk_exit: bool = option(
        False,
        "A classifier on the stages that the branches share, taught as a branch is: the cheapest first exit "
        "of a cascade.",
    )
    fusion_width: int | None = option(
        None,
        "Output channels N of the fusion module; the first branch's channels if not given.",
    )
    temperature: float | None = option(
        None,
        "T of the softened distributions; the method's own if not given.",
    )
    ramp_up: float = option(
        80 / 300,
        "Share of the epochs over which the distillation terms grow to their full weight.",
    )
    pretrained: bool = option(False, "Start torchvision: and timm: backbones from their published weights.")
    weights: Names = option(
        (),
        "Start branches from files of weights: branch0=FILE,branch1=FILE, or one for all. safetensors, .pth, "
        "or a run.",
    )
    weights_cache: Path | None = option(
        None,
        "Folder in which --pretrained looks first and keeps published weights; the libraries' own if not "
        "given.",
        metavar="DIR",
    )
    stochastic_depth: float | None = option(
        None,
        "Share of images for which training skips a network's last block, fewer towards its first (Huang et "
        "al. 2016); of torchvision: and timm: branches, their library's own if not given.",
        metavar="SHARE",
    )
    freeze: int = option(
        0,
        "Stages of each branch that stay as they are, from the first on. What they give is computed once "
        "where the training views allow it (none, or crop with --crop-padding 0).",
        metavar="STAGES",
    )
    head_epochs: int = option(
        0, "First epochs in which heads and fusion learn alone, every stage frozen.", metavar="EPOCHS"
    )
    teacher: str | None = option(
        None,
        "A trained network whose softened answers every classifier learns too: a run, a bundle, "
        "NAME=FILE of weights, or `ema`, the moving average of this run's own.",
        metavar="RUN|BUNDLE|NAME=FILE|ema",
    )
    teacher_weight: float = option(1.0, "Weight of the teacher's answers beside the method's own losses.")
    quantize_aware: Path | None = option(
        None,
        (
            "Fine-tune this finished run for int8, into a new run: its networks learn under the rounding "
            "that export writes."
        ),
        metavar="runs/NAME",
    )


@dataclass(frozen=True)
class OptimisationOptions:
    """Optimiser and schedule."""

    epochs: int = option(40, "Passes over the training images.")
    batch_size: int = option(
        128,
        "Images per optimiser step, over all processes and micro-batches together.",
    )
    accumulate: int = option(1, "Micro-batches per step and process: less memory, same step.")
    optimizer: Literal["sgd", "adamw"] = option("sgd", "SGD with Nesterov momentum, or AdamW.")
    lr: float = option(0.1, "Peak learning rate.")
    momentum: float = option(0.9, "Momentum of SGD (beta1 of AdamW).")
    weight_decay: float = option(1e-4, "Weight decay of the branches.")
    fusion_weight_decay: float = option(1e-5, "Weight decay of the fusion module.")
    schedule: Literal["multistep", "cosine", "onecycle"] = option(
        "onecycle",
        "Learning rate over the run: x0.1 at each milestone; cosine to 0; or linear up, linear down to 0.",
    )
    warmup: float = option(0.0, "Share of the run over which the learning rate first rises linearly.")
    milestones: tuple[float, ...] = option(
        (0.5, 0.75),
        "multistep: shares of the epochs after which the learning rate is multiplied by 0.1.",
        metavar="SHARE",
    )
    layer_decay: float = option(
        1.0, "Learning rate of a stage as a share of that of the stage after it; 1 is the same for all."
    )
    patience: int = option(
        0,
        "Epochs without a better validation accuracy after which training ends early; 0 is off.",
        metavar="EPOCHS",
    )
    label_smoothing: float = option(0.0, "Share of each label that is spread over all classes.")
    clip: float = option(0.0, "Largest gradient norm; 0 is off.")
    ema: float = option(
        0.0,
        "Decay per step of an exponential moving average of the weights (checkpoint `ema`); 0 is off.",
    )


@dataclass(frozen=True)
class MachineOptions:
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes the GPU where there is one.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto",
        "Arithmetic of the two passes. auto: what measures fastest, fp32 or bf16 (fp16 on GPUs without it).",
    )
    threads: int | None = option(
        None,
        (
            "CPU threads of this process; one per core where neither flag nor recipe says. Part of the "
            "result: sums are added in another order."
        ),
    )
    compile: bool = option(False, "Compile the network with torch.compile (pays on GPUs, not on CPUs).")
    cuda_graph: Literal["auto", "on", "off"] = option(
        "auto",
        "Launch the whole step at once, as a CUDA graph. auto: where that measures faster.",
    )
    deterministic: bool = option(
        False,
        "On a GPU, the same bits in every run and after every --resume, at some speed (a CPU's always are).",
    )
    channels_last: bool = option(
        True,
        "Compute in channels_last order, which is faster; off: in torch's default order, where a library "
        "has faults.",
    )
    sync_batchnorm: bool = option(False, "Batch normalisation over all processes (GPUs only).")
    workers: int | None = option(
        None,
        "Processes that decode images which do not fit into memory; one per core if not given.",
    )
    memory_limit: float | None = option(
        None,
        (
            "Largest decoded data set to hold in memory; a quarter of the free memory if not given. Above "
            "it, images stream."
        ),
        metavar="GIB",
    )


@dataclass(frozen=True)
class OutputOptions:
    """What is left behind."""

    out: Path | None = option(
        None,
        "Run directory to create; runs/DATA-METHOD-TIME if not given.",
        metavar="runs/NAME",
    )
    resume: Path | None = option(
        None,
        "Continue this run, with the configuration it was started with.",
        metavar="runs/NAME",
    )
    checkpoint_minutes: float = option(10.0, "Save at least this often, also in the middle of an epoch.")
    track: Names = option(
        (),
        f"Show the numbers of each epoch elsewhere too, beside TensorBoard: {', '.join(EXTRAS)}.",
    )
    quiet: bool = option(False, "No progress; errors only.")


@dataclass(frozen=True)
class TrainConfig:
    """Train networks by mutual distillation; without arguments FFL on scikit-learn's digits,
    a minute on two cores."""

    recipe: str | None = option(
        None,
        (
            "Named defaults that the other flags override, chosen by --data if not given; `list` prints them "
            "all."
        ),
        metavar="NAME|list",
    )
    seed: int = option(0, "Seed of weights, data order and augmentation.")
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
