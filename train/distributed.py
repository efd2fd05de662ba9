"""The processes of one training run. Alone, every call here is a no-op;
under torchrun they join one group."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class World:
    """This process among `size` processes; rank 0 alone writes files."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """-> `values` summed over all processes."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """-> whether `flag` is set on any process; all of them have to ask at the same step."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=device)) > 0)

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process rank 0's buffers: batch statistics differ,
        and evaluation must not depend on who does it."""
        if self.size > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)

    def share_weights(self, module: nn.Module) -> None:
        """Give every process rank 0's weights and buffers."""
        if self.size > 1:
            for parameter in module.parameters():
                distributed.broadcast(parameter.data, 0)
        self.share_buffers(module)

    def agree(self, text: str) -> str:
        """-> rank 0's text, on every process."""
        if self.size == 1:
            return text
        box = [text]
        distributed.broadcast_object_list(box)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            distributed.barrier()


def torchrun_world() -> World:
    """-> the place torchrun's environment gives this process; alone without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return (
        World(*(int(os.environ[name]) for name in names))
        if all(name in os.environ for name in names)
        else World()
    )


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Join the group for the block: NCCL on GPUs, gloo on CPUs."""
    if world.size == 1:
        yield
        return
    # DistributedDataParallel imports it, and imported within the group it keeps the group, its threads and
    # the tensors they hold to the very end, where a thread that lets go of one aborts the process (seen in 1
    # of 25 runs on a busy machine).
    importlib.import_module("torch._dynamo")
    if device.type == "cuda":
        distributed.init_process_group("nccl", device_id=device)  # else its barriers guess the GPU
    else:
        distributed.init_process_group("gloo")
    done = False
    try:
        yield
        done = True
    finally:
        # NCCL would wait for the other processes, which may be waiting for this one: after an error it is
        # left to the end of the process (train/run.py).
        if done or device.type != "cuda":
            distributed.destroy_process_group()
