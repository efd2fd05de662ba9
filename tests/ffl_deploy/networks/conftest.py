"""Small networks whose batch statistics and affine weights are not those of a fresh layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """These networks are too small for a second thread to help, and test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Weights and images that a test draws without a seed of its own do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def disturb() -> Callable[[nn.Module], nn.Module]:
    """`disturb(module)` moves every weight and statistic off its initial value,
    so that no layer is an identity or zero."""

    def apply(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in module.state_dict().items():
                if not value.is_floating_point():
                    continue
                noise = torch.rand(value.shape, generator=generator)
                if name.endswith("running_var"):
                    value.copy_(0.5 + noise)
                elif value.ndim == 1:
                    value.add_(0.2 * noise + 0.05)
                else:
                    value.add_(0.02 * (noise - 0.5))
        return module

    return apply


@pytest.fixture
def make_network(disturb: Callable[[nn.Module], nn.Module]) -> Callable[..., MutualNetwork]:
    """`make_network("resnet20", "resnet20", classes=3, ...)` -> a disturbed network for 16x16 images,
    in eval mode."""

    def make(*branches: str, classes: int = 3, size: int = 16, **options: object) -> MutualNetwork:
        torch.manual_seed(0)
        network = MutualNetwork(NetworkConfig(branches, classes, size, size, **options))  # type: ignore[arg-type]
        disturb(network)
        return network.eval()

    return make
