"""A configuration as plain data: stored in config.json, compared on resume,
checked for values no run can use."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import msgspec

from ffl_deploy.data import NAMED
from ffl_deploy.data.datasets import DataSpec
from ffl_deploy.data.lists import is_list
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.preprocessing import Look, sides
from train.config import TrainConfig
from train.methods import METHODS
from train.trackers import EXTRAS

# What a resumed run may do differently: none of it changes the result.
MAY_CHANGE = {
    "output.resume",
    "output.out",
    "output.quiet",
    "output.track",
    "output.checkpoint_minutes",
    "machine.workers",
    "machine.channels_last",
    "machine.memory_limit",
    "machine.cuda_graph",
    "recipe",
}


def data_spec(config: TrainConfig) -> DataSpec:
    """-> which images to read; paths are absolute, so that export finds them from anywhere."""
    source, root = config.data.source, config.data.root
    return DataSpec(
        source=source if source in NAMED else str(Path(source).expanduser().absolute()),
        root=None if root is None else str(root.expanduser().absolute()),
        image_size=config.data.image_size,
        validation=config.data.validation,
        skip_bad_images=config.data.skip_bad_images,
        column=config.data.column,
        label_column=config.data.label_column,
        calibration=config.data.calibration_split,
        look=look(config),
    )


def look(config: TrainConfig) -> Look | None:
    """-> how the images are to look where the options say so."""
    data = config.data
    mean, std = ((values[0], values[1], values[2]) if values else None for values in (data.mean, data.std))
    own = Look(mean, std, None if data.interpolation == "auto" else data.interpolation, data.crop_fraction)
    return None if own == Look() else own


def validate(config: TrainConfig) -> None:
    """Raise UsageError for values that no run can use."""
    o, d = config.optimisation, config.data
    rules = [
        (o.epochs >= 1, "--epochs must be at least 1"),
        (o.batch_size >= 2, "--batch-size must be at least 2 (batch normalisation needs two images)"),
        *(
            (math.isfinite(value), f"{flag_of(name)} must be a finite number")
            for name, value in flatten(options_to_json(config)).items()
            if isinstance(value, float)
        ),
        (config.seed >= 0, "--seed must be 0 or more"),
        (config.model.ramp_up >= 0, "--ramp-up is a share of the epochs, 0 (full weight at once) or more"),
        (config.output.checkpoint_minutes >= 0, "--checkpoint-minutes must be 0 (every step) or more"),
        (config.machine.threads is None or config.machine.threads >= 1, "--threads must be at least 1"),
        (o.accumulate >= 1, "--accumulate must be at least 1"),
        (o.batch_size >= 2 * o.accumulate, "--batch-size must be at least twice --accumulate"),
        (o.lr > 0, "--lr must be above 0"),
        (0 <= o.momentum < 1, "--momentum is from 0 to below 1"),
        (o.weight_decay >= 0 and o.fusion_weight_decay >= 0, "a weight decay is 0 or more"),
        (
            all(0 <= share <= 1 for share in o.milestones),
            "--milestones are shares of the epochs, from 0 to 1",
        ),
        (
            config.model.fusion_width is None or config.model.fusion_width >= 1,
            "--fusion-width must be at least 1",
        ),
        (config.model.freeze >= 0, "--freeze is a number of stages, 0 (none) or more"),
        (config.model.head_epochs >= 0, "--head-epochs is a number of epochs, 0 or more"),
        (o.patience >= 0, "--patience is a number of epochs, 0 (off) or more"),
        (config.model.teacher_weight > 0, "--teacher-weight must be above 0"),
        (
            config.model.teacher != "ema" or o.ema > 0,
            "--teacher ema needs the moving average: give --ema, such as 0.99",
        ),
        (
            config.model.teacher is None or config.model.quantize_aware is None,
            "--quantize-aware has a teacher of its own, the run that it fine-tunes: leave --teacher out",
        ),
        (0 < o.layer_decay <= 1, "--layer-decay is a share, above 0 and at most 1"),
        (
            d.crop_fraction is None or 0 < d.crop_fraction <= 1,
            "--crop-fraction is a share, above 0, at most 1",
        ),
        *(
            (
                len(values) in (0, 3) and all(low < value <= 1 for value in values),
                f"{flag} takes three numbers, of red, green and blue, between 0 and 1",
            )
            for flag, values, low in (("--mean", d.mean, -1e-9), ("--std", d.std, 0))
        ),
        (bool(d.mean) == bool(d.std), "--mean and --std come together"),
        (not (config.model.weights and config.model.pretrained), "give --weights or --pretrained, not both"),
        (0 <= o.warmup < 1, "--warmup is a share of the run, from 0 to below 1"),
        (0 <= o.label_smoothing < 1, "--label-smoothing is a share, from 0 to below 1"),
        (0 <= o.ema < 1, "--ema is a decay, from 0 (off) to below 1"),
        (o.clip >= 0, "--clip is a gradient norm, 0 (off) or more"),
        (0 < d.validation < 1, "--validation is a share, above 0 and below 1"),
        (0 <= d.calibration_split < 1, "--calibration-split is a share, from 0 (none) to below 1"),
        (d.image_size is None or min(sides(d.image_size)) >= 4, "--image-size must be at least 4 pixels"),
        (d.small_size is None or d.small_size >= 4, "--small-size must be at least 4 pixels"),
        (0 < d.small_share < 1, "--small-share is a share of the epochs, above 0 and below 1"),
        (d.crop_padding >= 0, "--crop-padding must be 0 or more"),
        (0 <= d.random_erase <= 1, "--random-erase is a share, from 0 (off) to 1"),
        (
            config.model.stochastic_depth is None or 0 <= config.model.stochastic_depth < 1,
            "--stochastic-depth is a share, from 0 (off) to below 1",
        ),
        (d.mixup >= 0 and d.cutmix >= 0, "--mixup and --cutmix must be 0 (off) or more"),
        (config.model.temperature is None or config.model.temperature > 0, "--temperature must be above 0"),
        (
            config.machine.workers is None or config.machine.workers >= 0,
            "--workers must be 0 (decode in the main process) or more",
        ),
        (
            config.machine.memory_limit is None or config.machine.memory_limit >= 0,
            "--memory-limit must be 0 (stream) or more",
        ),
        (
            set(config.output.track) <= set(EXTRAS),
            f"--track knows {', '.join(EXTRAS)}; TensorBoard is always there",
        ),
        (
            is_list(d.source) or d.column is d.label_column is None,
            "--column and --label-column are of a list of images, as in --data LIST.csv",
        ),
        (bool(config.model.branches), "--branches must name at least one backbone"),
        *(
            (config.model.quantize_aware is None or fits, f"--quantize-aware {text}")
            for fits, text in (
                (config.machine.precision == "fp32", "trains in fp32: leave --precision out"),
                (o.ema == 0, "keeps no moving average: leave --ema out"),
                (
                    not config.machine.sync_batchnorm,
                    "freezes batch normalisation: leave --sync-batchnorm out",
                ),
            )
        ),
    ]
    broken = [text for holds, text in rules if not holds]
    if broken:
        raise UsageError(f"{'; '.join(broken)}.")


# Where its images are now: by their content `require_same_data` sees whether they are the same.
MAY_MOVE = {"data.source", "data.root"}


def differences(stored: TrainConfig, wanted: TrainConfig, resumed: bool = False) -> list[str]:
    """-> "--flag is A, was B" for every option in which `wanted` is another run than the stored one.

    resumed: it goes on with that very run, whose images may have moved, and which may be given more epochs:
    they are no change of what was trained so far.
    """
    before, after = flatten(options_to_json(stored)), flatten(options_to_json(wanted))
    allowed = MAY_CHANGE | (MAY_MOVE if resumed else set())
    if resumed and wanted.optimisation.epochs > stored.optimisation.epochs:
        allowed = allowed | {"optimisation.epochs"}
    return [
        f"{flag_of(name)} is {after[name]!r} now and was {before[name]!r}"
        for name in before
        if before[name] != after[name] and name not in allowed
    ]


# What fine-tuning has to leave as the run that it goes on from had it: networks,
# and which image belongs to which split.
KEPT = (
    "model.",
    "data.source",
    "data.image_size",
    "data.validation",
    "data.calibration_split",
    "data.skip_bad_images",
    "data.column",
    "data.label_column",
)


def require_kept(started_from: TrainConfig, config: TrainConfig) -> None:
    """Raise UsageError where `config` has other networks or images than the run
    that --quantize-aware goes on from."""
    before, after = flatten(options_to_json(started_from)), flatten(options_to_json(config))
    changed = [
        f"{flag_of(name)} is {after[name]!r} now and was {before[name]!r}"
        for name in before
        if name.startswith(KEPT)
        and before[name] != after[name]
        and name not in ("model.ramp_up", "model.temperature")
    ]
    if changed:
        raise UsageError(
            f"--quantize-aware {config.model.quantize_aware} goes on with that run's networks and images, "
            f"but {'; '.join(changed)}: leave these flags out."
        )


def flag_of(name: str) -> str:
    """-> the flag of a flattened option: "optimisation.lr" -> "--lr"."""
    plain = name.split(".")[-1].replace("_", "-")
    return {"data.source": "--data", "data.root": "--data-root"}.get(name, f"--{plain}")


def flatten(options: dict[str, Any]) -> dict[str, Any]:
    """{"data": {"flip": True}} -> {"data.flip": True}."""
    flat: dict[str, Any] = {}
    for group, value in options.items():
        flat |= (
            {f"{group}.{name}": inner for name, inner in value.items()}
            if isinstance(value, dict)
            else {group: value}
        )
    return flat


def options_to_json(config: TrainConfig) -> dict[str, Any]:
    """-> plain data for config.json."""
    return msgspec.to_builtins(dataclasses.asdict(config), enc_hook=str)


def options_from_json(options: dict[str, Any]) -> TrainConfig:
    """The inverse of options_to_json. Raises CheckError for options of another version."""
    try:
        config = msgspec.convert(
            options, TrainConfig, dec_hook=lambda kind, value: kind(value) if kind is Path else value
        )
    except msgspec.ValidationError as error:
        raise CheckError(
            f"the run's config.json has options this version does not know ({error})."
        ) from error
    if config.model.method not in METHODS:
        raise CheckError(
            f"the run's config.json has a method this version does not know ({config.model.method!r})."
        )
    return config
