"""What stands for a CUDA graph on a CPU: the ATen operations of a step are noted, with the very tensors that
they read and wrote, and run again on these. A number of the host that a step bakes in stays what it was, as
it would on a GPU; so does everything that is not an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.cuda_graph import Replayable, Work
from train.step import Step

PLAIN, CAPTURED = 5.0, 2.0  # seconds of a step on the clock of `Recording`


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def storages(values: Any) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in tensors(values)}


class Noting(TorchDispatchMode):
    def __init__(self, host: set[int]) -> None:
        super().__init__()
        self.host, self.calls = host, list[tuple[Any, Any, Any, Any]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense" and not storages(args) & self.host:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")
        result = function(*args, **kwargs)
        if not storages(args) & self.host:
            self.calls.append((function, args, kwargs, result))
        return result


class Recording:
    """A `Device` of train/cuda_graph.py. plain, captured: what a step takes on its clock."""

    def __init__(self, step: Step, plain: float = PLAIN, captured: float = CAPTURED) -> None:
        self.step, self.plain, self.captured = step, plain, captured
        self.clock, self.ran, self.captures, self.replays = 0.0, 0, 0, 0

    def run(self, work: Work) -> list[Tensor]:
        self.clock, self.ran = self.clock + self.plain, self.ran + 1
        return work()

    def capture(self, work: Work) -> Replayable:
        """Nothing is computed by a capture: what `work` changes is put back."""
        kept = [(value, value.clone()) for value in self.state()]
        draws, self.captures = torch.get_rng_state(), self.captures + 1
        host = set() if self.step.ema is None else storages(self.step.ema.n_averaged)
        try:
            with Noting(host) as noted:
                rows = work()
        finally:
            with torch.no_grad():
                for value, before in kept:
                    value.copy_(before)
            torch.set_rng_state(draws)
        return Replayable(rows, self.replayer(noted.calls))

    def replayer(self, calls: list[tuple[Any, Any, Any, Any]]) -> Callable[[], None]:
        @torch.no_grad()
        def replay() -> None:
            self.clock, self.replays = self.clock + self.captured, self.replays + 1
            for function, args, kwargs, result in calls:
                again = function(*args, **kwargs)
                for old, new in zip(tensors(result), tensors(again), strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.detach().copy_(new)

        return replay

    def state(self) -> list[Tensor]:
        """-> all that a step changes."""
        step = self.step
        parts = [step.network.state_dict(), [step.optimizer.state[p] for p in step.optimizer.state]]
        parts += [step.ema.state_dict()] if step.ema is not None else []
        scaler = [getattr(step.scaler, name, None) for name in ("_scale", "_growth_tracker")]
        return tensors([*parts, *scaler])

    def mark(self) -> float:
        return self.clock

    def seconds(self, start: float, end: float) -> float:
        return end - start
