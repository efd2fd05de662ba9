"""What turns the branches' logits into further ones: the mean, ONE's gate, OKDDip's attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffl_deploy.networks.fusion import pool


def mean(logits: Sequence[Tensor]) -> Tensor:
    """The ensemble: logits [n, classes] of each branch -> their mean."""
    return torch.stack(list(logits)).mean(dim=0)


class Gate(nn.Module):
    """ONE (Lan et al. 2018, eq. 6): g = softmax(ReLU(BN(Linear(GAP(shared features)))));
    z_m = sum_k g_k z_k."""

    def __init__(self, trunk_channels: int, branches: int) -> None:
        super().__init__()
        self.linear = nn.Linear(trunk_channels, branches)
        self.bn = nn.BatchNorm1d(branches)

    def forward(self, shared: Tensor, pooled: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
        """shared: the trunk's map [n, C, h, w]; logits:
        n x classes of each branch -> gated logits [n, classes]."""
        weights = functional.softmax(functional.relu(self.bn(self.linear(pool(shared)))), dim=1)
        return torch.einsum("nk,knc->nc", weights, torch.stack(list(logits)))


class Attention(nn.Module):
    """OKDDip (Chen et al. 2020, eq. 4-6): A = softmax(q k^T) over the peers;
    peer i learns from t_i = sum_j A_ij z_j.

    Peers are the branches from 1 on; branch 0 is the leader. q and k are bias-free linears to C/8.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, max(channels // 8, 1), bias=False)
        self.key = nn.Linear(channels, max(channels // 8, 1), bias=False)

    def forward(self, shared: Tensor, pooled: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
        """pooled: features [n, C] of each branch; logits:
        n x classes of each -> targets [n, peers, classes]."""
        features = torch.stack(list(pooled[1:]), dim=1)
        weights = functional.softmax(self.query(features) @ self.key(features).transpose(1, 2), dim=2)
        return weights @ torch.stack(list(logits[1:]), dim=1).to(weights.dtype)


def build_aggregator(kind: str, trunk_channels: int, channels: Sequence[int]) -> Gate | Attention:
    """kind: "gate" or "attention"; channels: of each branch's last feature map."""
    return Gate(trunk_channels, len(channels)) if kind == "gate" else Attention(channels[0])
