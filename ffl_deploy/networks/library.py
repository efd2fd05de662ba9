"""Backbones of other libraries: `torchvision:NAME` (classification models)
and `timm:NAME` (models with a feature map).

A model is built as its library builds it and run once on noise; the modules that were called on the way to
the feature map become the stages, if one after the other they give the same map. timm models whose parts are
joined in other ways become one stage. Weights keep their library's initialisation, and can be given back by
name (plain_weights.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ffl_deploy.downloads import require_answer
from ffl_deploy.errors import UsageError, first_line
from ffl_deploy.installed import missing
from ffl_deploy.networks.stages import (
    Permute,
    Visit,
    agrees,
    channels_come_last,
    compose,
    group,
    record,
    units_of,
)

Pretrained = bool | Path
"""Whether a network starts from its published weights; a folder is where they are kept."""
CONNECT = 5.0  # seconds
LIBRARIES = ("torchvision", "timm")
STOCHASTIC_DEPTH = {"torchvision": "stochastic_depth_prob", "timm": "drop_path_rate"}
"""Library -> what its networks call the probability of skipping their last block."""
# What torchvision calls the modules after the feature map.
_HEADS = ("avgpool", "dropout", "classifier", "fc", "head", "heads")
# Sides of the noise image: large enough for a map of several pixels; some networks take their own size only.
_PROBES = (128, 224)


def library_stages(
    name: str,
    height: int,
    width: int,
    pretrained: Pretrained = False,
    stochastic_depth: float | None = None,
) -> list[nn.Module]:
    """name: `torchvision:NAME` or `timm:NAME` -> its stages; see `build_backbone`. Raises UsageError."""
    model = build_model(name, height, width, pretrained=pretrained, stochastic_depth=stochastic_depth)
    return [stage.train() for stage in stages_of(name, model.eval(), height, width)]


@torch.no_grad()
def stages_of(name: str, model: nn.Module, height: int, width: int) -> list[nn.Module]:
    """-> the stages of `model`, which `build_model` built and which is in eval mode. Raises UsageError."""
    return (
        torchvision_stages(name, model)
        if name.startswith("torchvision:")
        else timm_stages(name, model, height, width)
    )


def build_model(
    name: str,
    height: int,
    width: int,
    classes: int | None = None,
    pretrained: Pretrained = False,
    stochastic_depth: float | None = None,
) -> nn.Module:
    """-> the library's own model, with a classifier for `classes` where they are given. Raises UsageError."""
    cached = require_published(name, pretrained) if pretrained else None
    library, _, model = name.partition(":")
    known = library_names(library)
    if model.partition(".")[0] not in known:  # timm names may end in .TAG, which selects published weights
        near = get_close_matches(model, known, n=3)
        hint = (
            f"Did you mean {', '.join(repr(f'{library}:{other}') for other in near)}?"
            if near
            else "Check the spelling."
        )
        listing = "timm" if library == "timm" else "torchvision.models"
        raise UsageError(
            f"{library} has no model {model!r}. {hint} ({listing}.list_models() lists all {len(known)}.)"
        )
    skipping = {} if stochastic_depth is None else {STOCHASTIC_DEPTH[library]: stochastic_depth}
    try:
        if library == "torchvision":
            with kept_in(pretrained):
                return _torchvision_model(model, classes, bool(pretrained), skipping)
        return _timm_model(model, height, width, classes, pretrained, skipping)
    except Exception as error:  # each library, and each way to fail at a download, has exceptions of its own
        reason = first_line(error)
        if isinstance(error, TypeError) and any(argument in reason for argument in skipping):
            raise UsageError(
                f"{name} has no stochastic depth that could be set ({reason}); leave --stochastic-depth out."
            ) from error
        if cached is not None:
            raise UsageError(
                f"the published weights of {name} are damaged where they are kept, {cached} ({reason}); "
                "delete that file, and they are fetched anew."
            ) from error
        if pretrained:
            raise UsageError(
                f"the published weights of {name} cannot be had ({reason}); check the network connection, "
                "or train from scratch without --pretrained."
            ) from error
        raise UsageError(
            f"{name} cannot be built for images of {height}x{width} ({reason}); try another name or "
            "--image-size."
        ) from error


@contextmanager
def kept_in(pretrained: Pretrained) -> Iterator[None]:
    """For the block, torchvision looks for weights, and keeps them, in the folder that `pretrained` names."""
    before = torch.hub._hub_dir
    if isinstance(pretrained, Path):
        torch.hub.set_dir(str(pretrained))
    try:
        yield
    finally:
        torch.hub._hub_dir = before


def require_published(name: str, pretrained: Pretrained) -> Path | None:
    """-> the file in which the published weights of `name` are kept on this machine; None where they have to
    be fetched. Raises UsageError at once where neither is possible: the libraries try for a minute."""
    library, _, model = name.partition(":")
    if library == "torchvision":
        from torchvision import models

        with kept_in(pretrained):
            folder = Path(torch.hub.get_dir()) / "checkpoints"
        try:
            url = models.get_model_weights(model).DEFAULT.url
        except (ValueError, AttributeError):
            return None
        file = folder / url.rpartition("/")[2]
        if file.is_file():
            return file
        try:
            require_answer(url)
        except Exception as error:
            server, reason = "/".join(url.split("/")[:3]), first_line(error)
            raise _unreachable(name, folder, f"{server} does not answer: {reason}") from error
        return None
    return _kept_by_timm(name, model, pretrained)


def _unreachable(name: str, folder: object, reason: str) -> UsageError:
    return UsageError(
        f"the published weights of {name} cannot be had (they are not in {folder}, and {reason}); copy them "
        "there (--weights-cache DIR names another folder), give a file with --weights, or train from scratch "
        "without --pretrained."
    )


def _kept_by_timm(name: str, model: str, pretrained: Pretrained) -> Path | None:
    import timm
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    about = timm.get_pretrained_cfg(model)
    if about is None or not about.hf_hub_id:
        return None
    folder = pretrained if isinstance(pretrained, Path) else None
    for file in ("model.safetensors", "pytorch_model.bin"):
        kept = try_to_load_from_cache(about.hf_hub_id, file, cache_dir=folder)
        if isinstance(kept, str):
            return Path(kept)
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            get_session().head(constants.ENDPOINT, timeout=CONNECT)
            return None
        except Exception as error:  # of whatever HTTP library that one is built on
            reason = f"{constants.ENDPOINT} does not answer: {type(error).__name__}"
    raise _unreachable(name, folder or constants.HF_HUB_CACHE, reason)


def library_names(library: str) -> Sequence[str]:
    """-> the networks that one of LIBRARIES can build. Raises UsageError where it is not installed."""
    try:
        if library == "torchvision":
            from torchvision import models

            return models.list_models(module=models)
        import timm

        return timm.list_models()
    except ImportError as error:
        raise missing(library) from error


def _torchvision_model(
    name: str, classes: int | None, pretrained: bool, skipping: Mapping[str, float]
) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = dict(skipping) if classes is None else {"num_classes": classes, **skipping}
    if name in ("googlenet", "inception_v3"):
        options["aux_logits"] = False  # auxiliary classifiers are not part of the way to the feature map
        if not pretrained:
            options["init_weights"] = True
    if pretrained and name == "inception_v3":
        del options["aux_logits"]  # its published weights have them, and are refused without
    model = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    if hasattr(model, "transform_input"):
        model.transform_input = False  # normalisation is this project's, from the training images
    return model


def _timm_model(
    name: str,
    height: int,
    width: int,
    classes: int | None,
    pretrained: Pretrained,
    skipping: Mapping[str, float],
) -> nn.Module:
    import timm

    options: dict[str, Any] = {"num_classes": classes or 0, "pretrained": bool(pretrained), **skipping}
    if isinstance(pretrained, Path):
        options["cache_dir"] = str(pretrained)
    if _takes_one_size(name):
        options["img_size"] = (height, width)
    return timm.create_model(name, **options)


def _takes_one_size(timm_name: str) -> bool:
    """-> whether the model's windows or positions are laid out for one image size."""
    import timm

    configuration = timm.get_pretrained_cfg(timm_name)
    return configuration is not None and bool(configuration.fixed_input_size)


class _HeadReachedError(Exception):
    """Ends a forward pass at the first module of the head."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given


def torchvision_stages(name: str, model: nn.Module) -> list[nn.Module]:
    """-> the stages of a torchvision classification model:
    what is called before its pooling and classifier."""

    def stop(head: nn.Module, inputs: tuple[Any, ...]) -> None:
        raise _HeadReachedError(inputs[0])

    def features(images: Tensor) -> Tensor:
        heads = [head for head_name, head in model.named_children() if head_name in _HEADS]
        handles = [head.register_forward_pre_hook(stop) for head in heads]
        try:
            return model(images)
        except _HeadReachedError as reached:
            return reached.given
        finally:
            for handle in handles:
                handle.remove()

    seen = observe(name, model, features, [(side, side) for side in _PROBES])
    last = seen.visits[-1].after
    # DenseNet's last ReLU is a function
    for visits in (seen.visits, [*seen.visits, Visit(nn.ReLU(), last, last)]):
        if agrees(compose(visits, seen.images), seen.features):
            return group(visits)
    raise _no_feature_map(name)


def timm_stages(name: str, model: nn.Module, height: int, width: int) -> list[nn.Module]:
    """-> the stages of a timm model: what its `forward_features` calls, or that as a whole."""
    fixed = _takes_one_size(name.partition(":")[2])
    sizes = [(height, width)] if fixed else [(side, side) for side in _PROBES]
    whole = ForwardFeatures(model)
    seen = observe(name, model, whole, sizes)
    if not isinstance(seen.features, Tensor) or seen.features.ndim != 4:
        raise _no_feature_map(name)
    composed = compose(seen.visits, seen.images)
    if composed is not None and composed.ndim == 4 and agrees(composed, seen.features):
        # A unit with weights that is called twice would be stored twice.
        weighted = [id(visit.unit) for visit in seen.visits if visit.has_weights]
        if len(weighted) == len(set(weighted)):
            return group(seen.visits)
    used = {id(visit.unit) for visit in seen.visits}
    for child_name, child in model.named_children():
        if not any(id(unit) in used for unit in (child, *units_of(child))):
            # the head, and whatever else the feature map does not need
            setattr(model, child_name, nn.Identity())
    return [nn.Sequential(whole, Permute(0, 3, 1, 2)) if channels_come_last(seen.features.shape) else whole]


class ForwardFeatures(nn.Module):
    """A timm model up to its feature map."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """images: normalised [n, 3, h, w] -> what the model calls its features,
        [n, C, h', w'] or [n, h', w', C]."""
        return self.model.forward_features(images)


class Observation(NamedTuple):
    """One forward pass on `images`: the units that were called, and what they led to."""

    images: Tensor
    visits: list[Visit]
    features: Tensor


def observe(
    name: str, model: nn.Module, features: Callable[[Tensor], Tensor], sizes: Sequence[tuple[int, int]]
) -> Observation:
    """Run `features` on noise of the first of `sizes` that the model takes.
    Raises UsageError where it takes none."""
    failure: Exception | None = None
    for height, width in sizes:
        images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        try:
            return Observation(images, *record(model, features, images))
        except Exception as error:  # a size that the model cannot take; each one says so in its own way
            failure = error
    raise UsageError(
        f"{name} takes no images of {sizes[-1][0]}x{sizes[-1][1]} ({failure}); try another --image-size."
    )


def _no_feature_map(name: str) -> UsageError:
    return UsageError(
        f"{name} gives tokens, not a feature map of [n, channels, height, width], which fusion and pooling "
        "work on; choose a convolutional or hierarchical network such as torchvision:resnet18 or "
        "timm:convnext_atto."
    )
