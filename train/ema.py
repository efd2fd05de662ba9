"""The exponential moving average of the weights (--ema)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """torch's, with its names in checkpoints: `module` holds the average of weights and batch statistics.

    torch averages the counters of batches too, which are whole numbers and take four operations each: 184 in
    a step of ResNet-32, and two waits for a GPU. Nothing reads them; here they are copied, in one operation.
    The number of steps is counted apart (`count`), so that `average` is work of the device alone.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def average(self, network: nn.Module) -> None:
        """Take `network` in; the first time it is copied."""
        pairs = list(zip(tensors_of(self.module), tensors_of(network), strict=True))
        begun = int(self.n_averaged) > 0  # a number of the host, wherever the network is
        averaged = [pair for pair in pairs if pair[0].is_floating_point()] if begun else []
        copied = [pair for pair in pairs if not pair[0].is_floating_point()] if averaged else pairs
        if averaged:
            torch._foreach_lerp_([mine for mine, _ in averaged], [new for _, new in averaged], 1 - self.decay)
        if copied:
            torch._foreach_copy_([mine for mine, _ in copied], [new for _, new in copied])

    def count(self) -> None:
        """One more step was taken in."""
        self.n_averaged += 1

    def update_parameters(self, model: nn.Module) -> None:
        self.average(model)
        self.count()


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [value.detach() for value in (*module.parameters(), *module.buffers())]
