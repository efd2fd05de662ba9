"""Cutting another library's network into stages, at its resolutions, and proving that nothing was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Permute(nn.Module):
    """Reorder dimensions, as between [n, C, h, w] and [n, h, w, C]."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class Visit(NamedTuple):
    """One call of a unit: a module that is not a mere sequence of others."""

    unit: nn.Module
    before: torch.Size
    after: torch.Size

    @property
    def lowers_resolution(self) -> bool:
        # Dimension 2 is h of [n, C, h, w] and w of [n, h, w, C].
        return len(self.before) == len(self.after) == 4 and self.after[2] < self.before[2]

    @property
    def has_weights(self) -> bool:
        return any(True for _ in self.unit.parameters())


def units_of(module: nn.Module) -> Iterator[nn.Module]:
    """-> the children of `module` in order, with sequences and lists replaced by their own children."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) or type(child).forward is nn.Sequential.forward:
            yield from units_of(child)
        else:
            yield child


def record(model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor) -> tuple[list[Visit], Tensor]:
    """-> (the calls of `model`'s units during `run(images)`, in the order in which they ended;
    what it gives)."""
    visits: list[Visit] = []

    def hook(unit: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        visits.append(Visit(unit, _shape(inputs[0] if inputs else None), _shape(output)))

    handles = [unit.register_forward_hook(hook) for unit in dict.fromkeys(units_of(model))]
    try:
        return visits, run(images)
    finally:
        for handle in handles:
            handle.remove()


def _shape(value: object) -> torch.Size:
    return value.shape if isinstance(value, Tensor) else torch.Size()


def compose(visits: list[Visit], images: Tensor) -> Tensor | None:
    """-> what the units give one after the other, or None where they do not fit together that way."""
    x = images
    for visit in visits:
        try:
            x = visit.unit(x)
        except Exception:  # whatever a foreign module says to a wrong input, the answer is: not a chain
            return None
        if not isinstance(x, Tensor):
            return None
    return x


def agrees(found: Tensor | None, wanted: Tensor) -> bool:
    """-> whether `found` is `wanted`, which is the feature map or its global average [n, C];
    rounding apart."""
    if found is None or found.ndim != 4:
        return False
    if wanted.ndim == 2:
        found = found.mean(dim=(2, 3))
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max())


def group(visits: list[Visit]) -> list[nn.Module]:
    """Cut a chain where the resolution falls; -> stages, each from and to [n, C, h, w].

    A unit with weights opens a stage when it lowers the resolution, or when pooling since the last weights
    did; so that every stage has weights, and pooling ends the stage before it.
    """
    groups: list[list[Visit]] = []
    pooled = False
    for visit in visits:
        opens = visit.has_weights and (visit.lowers_resolution or pooled)
        if not groups or (opens and any(earlier.has_weights for earlier in groups[-1])):
            groups.append([])
        groups[-1].append(visit)
        pooled = not visit.has_weights and (pooled or visit.lowers_resolution)
    return [_stage(visits) for visits in groups]


def _stage(visits: list[Visit]) -> nn.Module:
    layers = [visit.unit for visit in visits]
    if channels_come_last(visits[0].before):
        layers.insert(0, Permute(0, 2, 3, 1))
    if channels_come_last(visits[-1].after):
        layers.append(Permute(0, 3, 1, 2))
    return nn.Sequential(*layers)


def channels_come_last(shape: torch.Size) -> bool:
    """-> whether a map of a square image is [n, h, w, C]."""
    return shape[1] == shape[2] != shape[3]
