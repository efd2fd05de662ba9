"""Mean, gate and attention against NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ffl_deploy.networks.aggregators import Attention, Gate, build_aggregator, mean


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_mean_is_the_mean_of_the_logits() -> None:
    logits = [torch.randn(4, 5) for _ in range(3)]
    np.testing.assert_allclose(
        mean(logits).numpy(), np.mean([z.numpy() for z in logits], axis=0), rtol=1e-5, atol=1e-6
    )


def test_gate_is_its_equation() -> None:
    torch.manual_seed(0)
    gate = Gate(trunk_channels=6, branches=3).double().eval()
    nn.init.uniform_(gate.bn.weight, 0.5, 1.5)
    nn.init.normal_(gate.bn.bias)
    nn.init.normal_(gate.bn.running_mean)
    shared, logits = torch.randn(4, 6, 5, 5).double(), [torch.randn(4, 7).double() for _ in range(3)]
    w = {name: value.detach().numpy() for name, value in gate.state_dict().items()}
    linear = shared.numpy().mean(axis=(2, 3)) @ w["linear.weight"].T + w["linear.bias"]
    scaled = (linear - w["bn.running_mean"]) / np.sqrt(w["bn.running_var"] + 1e-5) * w["bn.weight"] + w[
        "bn.bias"
    ]
    weights = softmax(np.maximum(scaled, 0))
    assert np.ptp(weights) > 0.1, "otherwise this would also pass with a plain mean"
    wanted = sum(weights[:, [k]] * logits[k].numpy() for k in range(3))
    np.testing.assert_allclose(gate(shared, [], logits).detach().numpy(), wanted, rtol=1e-10)


def test_attention_is_its_equation_and_leaves_the_leader_out() -> None:
    torch.manual_seed(0)
    attention = Attention(channels=16).double()
    pooled, logits = (
        [torch.randn(4, 16).double() for _ in range(4)],
        [torch.randn(4, 5).double() for _ in range(4)],
    )
    query, key = attention.query.weight.detach().numpy(), attention.key.weight.detach().numpy()
    assert query.shape == (2, 16), "projections to C/8"
    found = attention(torch.empty(0), pooled, logits).detach().numpy()
    assert found.shape == (4, 3, 5)
    for sample in range(4):
        for i in (1, 2, 3):
            scores = [
                query @ pooled[i][sample].numpy() @ (key @ pooled[j][sample].numpy()) for j in (1, 2, 3)
            ]
            weights = softmax(np.array(scores))
            wanted = sum(weights[j - 1] * logits[j][sample].numpy() for j in (1, 2, 3))
            np.testing.assert_allclose(found[sample, i - 1], wanted, rtol=1e-10)


def test_attention_targets_carry_gradients_to_its_projections() -> None:
    attention = build_aggregator("attention", 8, [16, 16, 16])
    pooled = [torch.randn(4, 16) for _ in range(3)]
    attention(torch.empty(0), pooled, [torch.randn(4, 5) for _ in range(3)]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in attention.parameters())
