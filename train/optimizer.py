"""Optimizer, its parameter groups, and their state as named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ffl_deploy.networks.mutual import MutualNetwork
from train.config import OptimisationOptions

SCALE = "scale"  # of a group: its learning rate as a share of the step's


def build_optimizer(network: MutualNetwork, options: OptimisationOptions) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW; the fusion module has a weight decay of its own (Kim et al. 2019,
    IV-A), and each stage a learning rate of its own with --layer-decay (discriminative fine-tuning, Howard
    and Ruder 2018): `SCALE` of its group, as a share of that of heads and fusion."""
    fusion = list(network.fusion.parameters()) if network.fusion is not None else []
    own = {id(parameter) for parameter in fusion}
    groups: list[dict[str, Any]] = []
    if options.layer_decay != 1:
        for number, stage in enumerate(network.stages()):
            parameters = [parameter for module in stage for parameter in module.parameters()]
            own |= {id(parameter) for parameter in parameters}
            scale = options.layer_decay ** (network.depth - number)
            groups.append({"params": parameters, "weight_decay": options.weight_decay, SCALE: scale})
    rest = [parameter for parameter in network.parameters() if id(parameter) not in own]
    groups.append({"params": rest, "weight_decay": options.weight_decay})
    if fusion:
        groups.append({"params": fusion, "weight_decay": options.fusion_weight_decay})
    # fused: one kernel for all parameters; on GPUs it saves thousands of launches a step,
    # on CPUs it is no slower.
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=(options.momentum, 0.999), fused=True)
    sgd = torch.optim.SGD(
        groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0, fused=True
    )
    if options.momentum > 0:
        # Starting from zero is what a first step does anyway. The fused step fails when only some parameters
        # have momentum yet, which happens as soon as a method freezes others in the first steps.
        for parameter in network.parameters():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """-> the optimizer's state as "INDEX.NAME" -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value
        for index, named in state.items()
        for name, value in named.items()
        if value is not None
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of optimizer_tensors; learning rates are set anew at every step.

    Files know no strides, but fused optimizers walk parameter and state by the same ones:
    each state takes its parameter's.
    """
    content = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = int(key.split(".", 1)[0]), key.split(".", 1)[1]
        parameter = parameters[index]
        strided = (
            value
            if value.shape != parameter.shape
            else torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        )
        state.setdefault(index, {})[name] = strided
    content["state"] = state
    optimizer.load_state_dict(content)


def drop_gradients(modules: Iterable[nn.Module]) -> None:
    """Make the next optimizer step leave these modules alone: no gradient, no weight decay, no momentum."""
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = None
