"""Accuracy and logits of every classifier on held-out images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ffl_deploy.networks.mutual import MutualNetwork
from ffl_deploy.networks.targets import target_names
from train.data.batches import Batches
from train.machine import Place


@torch.inference_mode()
def accuracies(
    network: MutualNetwork, batches: Batches, split: str, place: Place, answering: nn.Module | None = None
) -> dict[str, float]:
    """-> classifier -> share of correct answers (0..1) on "validation" or "test",
    counted exactly over all processes.

    answering: what answers with the network's weights, where it is not the network itself.
    """
    model = (answering or network).eval()
    names = target_names(network)  # not from the batches: a process may have no image of a small split
    correct = {name: torch.zeros((), dtype=torch.int64, device=place.device) for name in names}
    count = torch.zeros((), dtype=torch.int64, device=place.device)
    for images, labels in batches.evaluation(split):
        with place.autocast():
            outputs = model(images)
        count += len(labels)
        for name, logits in outputs.classifiers().items():
            correct[name] += (logits.argmax(dim=1) == labels).sum()
    total, *right = place.world.sum(torch.stack([count, *correct.values()])).tolist()
    return {name: hits / total for name, hits in zip(names, right, strict=True)}


@torch.inference_mode()
def predictions(
    network: MutualNetwork, batches: Batches, split: str, images: int, place: Place
) -> dict[str, np.ndarray]:
    """-> classifier -> predicted labels int64 [images] of all of `split`, in its order, on every process."""
    network.eval()
    mine: dict[str, list[Tensor]] = {name: [] for name in target_names(network)}
    for pixels, _ in batches.evaluation(split):
        with place.autocast():
            outputs = network(pixels)
        for name, logits in outputs.classifiers().items():
            mine[name].append(logits.argmax(dim=1))
    found = {}
    for name, chunks in mine.items():
        whole = torch.zeros(images, dtype=torch.int64, device=place.device)
        if chunks:  # a process may have no image of a small split
            # as Batches.evaluation deals them out
            whole[place.world.rank :: place.world.size] = torch.cat(chunks)
        found[name] = place.world.sum(whole).cpu().numpy()
    return found


@torch.inference_mode()
def logits_of(network: MutualNetwork, images: Tensor) -> dict[str, np.ndarray]:
    """images: normalised [n, 3, h, w] -> classifier -> float32 logits [n, classes], in full precision."""
    network.eval()
    chunks = [network(chunk).classifiers() for chunk in images.split(64)]
    return {name: torch.cat([chunk[name] for chunk in chunks]).float().cpu().numpy() for name in chunks[0]}
