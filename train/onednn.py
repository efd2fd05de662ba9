"""A way around a fault of oneDNN, the library that computes torch's convolutions on CPUs.

Backward of a 1x1 convolution with a stride, on images in channels_last order whose channels are fewer than a
vector register holds (RGB: the stems of RepVGG and MobileOne), writes past its workspace on AVX2: SIGSEGV, a
damaged heap, a hang, or, without a word, wrong gradients of the weights (uxlfoundation/oneDNN#6035). In
torch's default order the library takes another way, which is right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VECTOR = 16  # channels of fp32 in the widest register (AVX-512); AVX2 has 8


def keep_off_faulty_kernels(network: nn.Module) -> list[str]:
    """Let the convolutions that the fault can hit compute in torch's default order; -> their names.

    What they compute stays the same to the last bits; names and shapes of the weights stay too.
    """
    found = [name for name, module in network.named_modules() if _can_be_hit(module)]
    for name in found:
        convolution = network.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d)
        # A 1x1 weight counts as channels_last by its strides, and one operand in that order is enough.
        convolution.weight.data = convolution.weight.data.clone(memory_format=torch.contiguous_format)
        convolution.register_forward_pre_hook(_contiguous)
    return found


def in_default_order(network: nn.Module) -> None:
    """Let the whole network compute in torch's default order (--no-channels-last)."""
    network.to(memory_format=torch.contiguous_format)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    network.register_forward_pre_hook(_contiguous)


def _can_be_hit(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.in_channels // module.groups < VECTOR
    )


def _contiguous(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    images, *others = inputs
    assert isinstance(images, Tensor)
    return images.contiguous(memory_format=torch.contiguous_format), *others
