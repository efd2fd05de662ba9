"""Named defaults. `paper` recipes are the publication's networks, optimizer, schedule and augmentation,
exactly; `fast` ones are ours. Their numbers are never mixed.

One thing differs from the publications in both: `--validation`, 10 % of every class, is held out to choose
the best epoch, so CIFAR's recipes train on 45,000 of the 50,000 images. Published numbers are of all 50,000,
and of the last epoch or of the best one on the test images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ffl_deploy.errors import UsageError, choices_sentence
from train.config import (
    DataOptions,
    MachineOptions,
    ModelOptions,
    OptimisationOptions,
    OutputOptions,
    TrainConfig,
)
from train.methods import build_method

# Kim et al. 2019, section IV, and the official code: SGD 0.1, batch 128, 300 epochs, x0.1 at 150 and 225.
_PAPER_CIFAR = OptimisationOptions(
    epochs=300, batch_size=128, lr=0.1, weight_decay=1e-4, schedule="multistep"
)
# An hour of two cores with fast bf16. Most epochs at 24 pixels, which cost 0.6 of the others; the last ones
# at full size (docs/performance.md).
_FAST_CIFAR_DATA = DataOptions(validation=0.02, small_size=24, small_share=0.65)
# One-cycle to 0.2 with a fifth of warm-up and a larger weight decay: what a short schedule needs.
_FAST_CIFAR = OptimisationOptions(
    epochs=40,
    batch_size=128,
    lr=0.2,
    weight_decay=5e-4,
    fusion_weight_decay=5e-4,
    schedule="onecycle",
    warmup=0.2,
)
# Kim et al. 2019, section IV-D: ResNet-34, SGD 0.1, x0.1 every 30 of 90 epochs, weight decay 1e-4.
_PAPER_IMAGENET = OptimisationOptions(
    epochs=90, batch_size=256, lr=0.1, weight_decay=1e-4, schedule="multistep", milestones=(1 / 3, 2 / 3)
)

# Published weights know most of it already. AdamW, the rate of a stage 0.7 of that of the stage after it;
# heads and fusion, which know nothing, learn alone first (Kumar et al. 2022). An unequal pair, cheap and
# dear, without squeeze-and-excitation or swish. Views are few, so that what frozen stages give is computed
# once.
_FINE_TUNING = OptimisationOptions(
    epochs=12,
    batch_size=64,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.02,
    fusion_weight_decay=0.02,
    schedule="cosine",
    warmup=0.1,
    layer_decay=0.7,
)


def _cifar(source: str, backbone: str, data: DataOptions, optimisation: OptimisationOptions) -> TrainConfig:
    model = ModelOptions(branches=(backbone, backbone))
    return TrainConfig(data=replace(data, source=source), model=model, optimisation=optimisation)


def _imagenet(backbone: str) -> TrainConfig:
    return TrainConfig(
        data=DataOptions(source="imagenet", image_size=224, augment="resized-crop", validation=0.02),
        model=ModelOptions(branches=(backbone, backbone)),
        optimisation=_PAPER_IMAGENET,
    )


RECIPES: dict[str, TrainConfig] = {
    "digits": TrainConfig(
        data=DataOptions(crop_padding=1, flip=False),
        model=ModelOptions(branches=("resnet20", "resnet20")),
        optimisation=replace(_FAST_CIFAR, epochs=40, batch_size=64, lr=0.1),
        # Layers of 8x8 pixels are too small to share: a second thread mostly waits,
        # for ever where others use the cores.
        machine=MachineOptions(threads=1),
    ),
    "folder": TrainConfig(
        data=DataOptions(source="DIR"),
        model=ModelOptions(branches=("resnet32", "resnet32")),
        optimisation=replace(_FAST_CIFAR, epochs=60, batch_size=64, lr=0.1),
    ),
    **{
        f"{source}-resnet{depth}-{kind}": _cifar(source, f"resnet{depth}", *settings)
        for source in ("cifar10", "cifar100")
        for depth in (32, 56, 110)
        for kind, settings in (
            ("paper", (DataOptions(), _PAPER_CIFAR)),
            ("fast", (_FAST_CIFAR_DATA, _FAST_CIFAR)),
        )
    },
    "finetune": TrainConfig(
        data=DataOptions(source="DIR", crop_padding=0),
        model=ModelOptions(
            branches=("timm:tf_efficientnet_lite0", "timm:tf_efficientnet_lite1"),
            fusion_width=256,
            freeze=2,
            head_epochs=2,
        ),
        optimisation=_FINE_TUNING,
    ),
    "imagenet-resnet18": _imagenet("torchvision:resnet18"),
    "imagenet-resnet34": _imagenet("torchvision:resnet34"),
}


def default_recipe(data: str) -> str:
    """-> the recipe that suits `--data data` when none is named."""
    if data in ("cifar10", "cifar100"):
        return f"{data}-resnet32-fast"
    return "digits" if data == "digits" else "folder"


def recipe_for(typed: Mapping[str, Any]) -> TrainConfig:
    """-> the defaults that flags (flags.Typed) select with --recipe or, without it, with --data.
    Raises UsageError."""
    begun = typed.get("model.weights") or typed.get("model.pretrained")
    name = typed.get("recipe") or (
        "finetune" if begun else default_recipe(typed.get("data.source", "digits"))
    )
    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r}. {choices_sentence(name, list(RECIPES))}")
    model = RECIPES[name].model
    branches = build_method(typed.get("model.method", model.method)).branches_for(model.branches)
    return replace(RECIPES[name], recipe=name, model=replace(model, branches=branches))


def fine_tuning(trained: TrainConfig, run: Path) -> TrainConfig:
    """-> what `--quantize-aware run` starts from: the run's own configuration (`trained`),
    its last part in low gear.

    A tenth of its epochs at 1/200 of its peak learning rate, falling to 0, and gradients of norm 1 at most:
    with batch normalisation frozen nothing else bounds a step. Images at full size, distillation at full
    weight at once, in fp32, in which rounding to 256 levels is exact.
    """
    old = trained.optimisation
    epochs = max(1, round(0.1 * old.epochs))
    return replace(
        trained,
        data=replace(
            trained.data, small_size=None, mixup=0.0, cutmix=0.0, auto_augment="none", random_erase=0.0
        ),
        model=replace(
            trained.model,
            quantize_aware=run,
            ramp_up=0.0,
            pretrained=False,
            weights=(),
            stochastic_depth=None,
            freeze=0,
            head_epochs=0,
            teacher=None,
        ),
        optimisation=replace(
            old, epochs=epochs, lr=old.lr / 200, schedule="cosine", warmup=0.0, clip=1.0, ema=0.0, patience=0
        ),
        machine=replace(trained.machine, precision="fp32", sync_batchnorm=False),
        output=OutputOptions(),
    )
