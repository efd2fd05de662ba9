"""How the weights that a network starts from want their images: size, resizing, crop and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
from safetensors import SafetensorError, safe_open

from ffl_deploy.networks.backbones import is_library_name
from ffl_deploy.preprocessing import ImageSize, Look
from ffl_deploy.run_directory import load_run
from train.config import TrainConfig
from train.weights import run_of, sources


class Wanted(NamedTuple):
    """The images that weights were trained on."""

    size: ImageSize
    look: Look


def look_of_file(name: str, path: Path) -> Look | None:
    """-> how the weights in `path`, of the network `name`, want their images; None where nothing says so."""
    wanted = _wanted_by_file(path) or _wanted_by_library(name)
    return None if wanted is None else wanted.look


def as_weights_want(config: TrainConfig) -> TrainConfig:
    """-> `config`, whose images have the size, the resizing and the normalisation of the weights that the
    first of its branches which has any starts from, wherever it does not say otherwise."""
    data, looks = config.data, wanted_by_branches(config)
    if not looks:
        return config
    wanted = next(iter(looks.values()))
    size, filter_ = wanted.size, cast(Any, wanted.look.filter or "auto")
    changed = replace(
        data,
        image_size=size if data.image_size is None else data.image_size,
        interpolation=filter_ if data.interpolation == "auto" else data.interpolation,
        crop_fraction=wanted.look.crop_fraction if data.crop_fraction is None else data.crop_fraction,
        mean=data.mean or wanted.look.mean or (),
        std=data.std or wanted.look.std or (),
    )
    return replace(config, data=changed)


def wanted_by_branches(config: TrainConfig) -> dict[int, Wanted]:
    """-> branch -> the images of the weights that it starts from, of those alone of which that is known."""
    model = config.model
    files = sources(model.weights, model.branches)
    found: dict[int, Wanted] = {}
    for branch, name in enumerate(model.branches):
        wanted = _wanted_by_file(files[branch]) if branch in files else None
        if wanted is None and (branch in files or model.pretrained):
            wanted = _wanted_by_library(name)
        if wanted is not None:
            found[branch] = wanted
    return found


SAME_COLOURS = 0.02
"""Difference of two means or deviations, on the 0..1 scale, that no network minds."""


def doubts(config: TrainConfig, shared: int) -> list[str]:
    """-> lines about a start that is hardly what was meant: weights that get other colours than their own,
    and stages that are frozen before they have learned anything. shared: stages that the branches share."""
    model, data, lines = config.model, config.data, []
    for branch, (_, look) in wanted_by_branches(config).items():
        asked = [(look.mean, data.mean), (look.std, data.std)]
        if any(_apart(one, other) for one, other in asked):
            lines.append(
                f"branch{branch} starts from weights that were trained with pixels of mean "
                f"{_numbers(look.mean)} and deviation {_numbers(look.std)}, and gets {_numbers(data.mean)} "
                f"and {_numbers(data.std)}: it knows less then; take weights of one kind for all branches"
            )
    begun = sources(model.weights, model.branches)
    nothing = [
        f"branch{branch} ({name})"
        for branch, name in enumerate(model.branches)
        if branch not in begun and not (model.pretrained and is_library_name(name))
    ]
    if nothing and model.freeze > (shared if len(nothing) < len(model.branches) else 0):
        lines.append(
            f"{', '.join(nothing)} starts from nothing, and --freeze {model.freeze} keeps its first stages "
            "so: give it weights, or type --freeze 0"
        )
    return lines


def _apart(one: Sequence[float] | None, other: Sequence[float]) -> bool:
    return bool(one and other) and any(
        abs(a - b) > SAME_COLOURS for a, b in zip(one or (), other, strict=True)
    )


def _numbers(values: Sequence[float] | None) -> str:
    return " ".join(f"{value:.3g}" for value in values or ())


def _wanted_by_file(path: Path) -> Wanted | None:
    """-> of a run, of a checkpoint in it, or of a file that `train.branch_weights` wrote."""
    if folder := run_of(path):
        run = load_run(folder)
        how, scaled = run.preprocessing, [tuple(v / 255 for v in values) for values in (run.mean, run.std)]
        mean, std = (cast(tuple[float, float, float], values) for values in scaled)
        return Wanted((how.width, how.height), Look(mean, std, how.filter, how.crop_fraction))
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        height, _, width = about["image_size"].partition("x")
        said = [key for key in Look.__struct_fields__ if key in about]
        look = {key: msgspec.json.decode(about[key]) for key in said}
        return Wanted((int(width), int(height)), msgspec.convert(look, Look))
    except (SafetensorError, KeyError, ValueError, msgspec.MsgspecError):
        return None  # the reader says what is wrong with it; others say nothing


def _wanted_by_library(name: str) -> Wanted | None:
    """-> as the library trained the weights that it publishes for this network; None for own networks."""
    library, _, model = name.partition(":")
    if library == "timm":
        import timm

        about = timm.get_pretrained_cfg(model)
        if about is None:
            return None
        _, height, width = about.input_size
        return Wanted((width, height), _look(about.mean, about.std, about.interpolation, about.crop_pct))
    if library == "torchvision":
        from torchvision import models

        with suppress(ValueError):  # the network's builder says what is wrong with a name
            about = models.get_model_weights(model).DEFAULT.transforms()
            size, share = about.crop_size[0], min(1.0, about.crop_size[0] / about.resize_size[0])
            return Wanted((size, size), _look(about.mean, about.std, about.interpolation.value, share))
    return None


def _look(mean: Sequence[float], std: Sequence[float], filter_: str, share: float) -> Look:
    known = cast(Any, filter_ if filter_ in ("bilinear", "bicubic", "lanczos", "box") else None)
    return Look((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), known, share)
