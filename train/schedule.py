"""Learning rate and ramp-up: pure functions of the step, so that a resumed run needs no state for them."""

from __future__ import annotations

import math

from train.config import OptimisationOptions


def learning_rate(step: int, steps: int, options: OptimisationOptions) -> float:
    """Learning rate of optimiser step `step` of 0..steps-1. Shares (warm-up, milestones)
    are of the whole run."""
    warm = options.warmup * steps
    if step < warm:
        return options.lr * (step + 1) / (math.ceil(warm) + 1)
    progress = (step - warm) / max(steps - warm, 1)  # 0 at the end of the warm-up, below 1 at the last step
    if options.schedule == "multistep":
        return options.lr * 0.1 ** sum(step >= round(share * steps) for share in options.milestones)
    if options.schedule == "cosine":
        return options.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return options.lr * (1 - progress)  # onecycle: after the rise, linear to 0


def ramp_up(epoch: int, epochs: int, share: float) -> float:
    """Weight of the distillation terms in `epoch` (from 0): exp(-5 (1 - min(e, R)/R)^2), R = share * epochs.

    Kim et al. 2019, after Laine and Aila 2017; R is 80 of 300 epochs there.
    """
    length = share * epochs
    return 1.0 if length <= 0 else math.exp(-5 * (1 - min(epoch, length) / length) ** 2)
