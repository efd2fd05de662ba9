"""The whole step of training as one CUDA graph (--cuda-graph).

A step of small images is many short kernels: some seven hundred launches of 5 to 8 microseconds, during which
a fast GPU mostly waits for the host. A captured step is one launch. Each shape of a step (its micro-batches,
what is frozen) is run as it is a few times, in which cuDNN chooses its algorithms, then captured, then
replayed on batches that are copied into the captured step's own. Replayed, a step computes what it computes
without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from train.config import MachineOptions
from train.data.batches import Batch
from train.machine import Place, why_no_graph
from train.step import Step

WARM = 3  # steps of a shape that run as they are before it is captured
TIMED = 20  # steps of either kind that `auto` compares
MOST = 16  # shapes that are captured; each holds its batches and part of a common pool of memory

Work = Callable[[], list[Tensor]]
Key = tuple[Any, ...]


class Replayable(NamedTuple):
    """rows: what the work answered, overwritten by every replay."""

    rows: list[Tensor]
    replay: Callable[[], None]


class Device(Protocol):
    """What captures work; CUDA, or what stands for it in a test."""

    def run(self, work: Work) -> list[Tensor]:
        """Do the work as it is, where capturing it will expect its memory."""

    def capture(self, work: Work) -> Replayable:
        """Note what the device would do, without doing it. Raises RuntimeError for work that needs the
        host."""

    def mark(self) -> Any:
        """-> a point in the device's own time."""

    def seconds(self, start: Any, end: Any) -> float:
        """-> time between two marks; waits for the second."""


class Cuda:
    """A GPU: a stream for what is captured, and one pool of memory for all captures, which never run at
    once."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> list[Tensor]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            rows = work()
        current.wait_stream(self.stream)
        return rows

    def capture(self, work: Work) -> Replayable:
        graph = torch.cuda.CUDAGraph()
        # of this thread alone: others pin memory and write checkpoints meanwhile
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            rows = work()
        return Replayable(rows, graph.replay)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Captured(NamedTuple):
    """A shape of a step: the batches that it reads, and how it is run."""

    batches: list[Batch]
    step: Replayable


@dataclass(eq=False)
class GraphedStep:
    """`step`, captured and replayed; with `choose` only where that measures faster than the step as it is."""

    step: Step
    device: Device
    choose: bool
    say: Callable[[str], None]
    seen: dict[Key, int] = field(default_factory=dict)  # steps of each shape so far
    captured: dict[Key, Captured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.used = True
        self.compared: Key | None = None  # the shape that `choose` times
        self.times: dict[bool, list[tuple[Any, Any]]] = {False: [], True: []}  # captured? -> marks

    def __call__(self, batches: list[Batch], frozen: Sequence[nn.Module]) -> list[Tensor]:
        """As Step's."""
        if not self.used:
            return self.step(batches, frozen)
        key = shape_of(batches, frozen)
        replayed = self.is_ready(key, batches, frozen)
        start = self.device.mark() if key == self.compared else None
        rows = self.replayed(key, batches) if replayed else self.as_it_is(key, batches, frozen)
        self.step.count()
        if start is not None:
            self.compare(replayed, start)
        return rows

    def as_it_is(self, key: Key, batches: list[Batch], frozen: Sequence[nn.Module]) -> list[Tensor]:
        self.seen[key] = self.seen.get(key, 0) + 1
        if self.choose and not self.times[False] and self.compared is None and self.seen[key] == WARM:
            self.compared = key  # the first one that is warm; what it shows is for all
        return self.device.run(lambda: self.step.work(batches, frozen))

    def replayed(self, key: Key, batches: list[Batch]) -> list[Tensor]:
        own, step = self.captured[key]
        fill(own, batches)
        step.replay()
        return [row.clone() for row in step.rows]

    def is_ready(self, key: Key, batches: list[Batch], frozen: Sequence[nn.Module]) -> bool:
        """-> whether steps of this shape are captured; captures them once they have run often enough."""
        if key in self.captured:
            return True
        waiting = self.choose and len(self.times[False]) < TIMED  # for the times of the step as it is
        if waiting or self.seen.get(key, 0) < WARM or len(self.captured) == MOST:
            return False
        own = copies(batches)
        try:
            with capturable(self.step.optimizer):
                self.captured[key] = Captured(own, self.device.capture(lambda: self.step.work(own, frozen)))
        except RuntimeError as error:
            self.give_up(error)
        return key in self.captured

    def give_up(self, error: RuntimeError) -> None:
        """Go on without. A capture computes nothing, so that nothing is lost; what it left half done is
        undone."""
        first = str(error).strip().split("\n")[0]
        self.say(f"training goes on without a CUDA graph: this step cannot be captured ({first}).")
        self.used, self.compared = False, None
        self.captured.clear()
        self.step.optimizer.zero_grad(set_to_none=True)
        if self.step.scaler.is_enabled():
            self.step.scaler._per_optimizer_states.clear()  # of the step that was not taken

    def compare(self, replayed: bool, start: Any) -> None:
        """Note the time of a step, and decide once there are enough of both kinds."""
        self.times[replayed].append((start, self.device.mark()))
        if len(self.times[True]) < TIMED:
            return
        self.compared = None
        plain, captured = (
            median(self.device.seconds(*marks) for marks in self.times[kind]) for kind in (False, True)
        )
        self.used = captured < plain
        if not self.used:
            self.captured.clear()
        self.say(
            f"a step takes {1e3 * captured:.2f} ms as a CUDA graph and {1e3 * plain:.2f} ms without: "
            f"training goes on {'with it' if self.used else 'without it'}."
        )


class capturable:
    """For the block, torch's optimizers that refuse to be captured unless told so (AdamW) are told so."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.groups = [group for group in optimizer.param_groups if "capturable" in group]

    def __enter__(self) -> None:
        for group in self.groups:
            group["capturable"] = True

    def __exit__(self, *_: object) -> None:
        for group in self.groups:
            group["capturable"] = False


def shape_of(batches: list[Batch], frozen: Sequence[nn.Module]) -> Key:
    """-> what a captured step cannot change: shapes, kinds of labels, and which modules learn."""
    shapes = [(batch.images.shape, batch.soft_labels.shape, batch.soft_labels.dtype) for batch in batches]
    return (*shapes, *map(id, frozen))


def copies(batches: list[Batch]) -> list[Batch]:
    """-> batches of the same values with memory of their own."""
    own = []
    for images, labels, soft_labels in batches:
        kept = labels.clone()
        own.append(Batch(images.clone(), kept, kept if soft_labels is labels else soft_labels.clone()))
    return own


def fill(own: list[Batch], batches: list[Batch]) -> None:
    """Copy `batches` into `own`, on the device."""
    for mine, new in zip(own, batches, strict=True):
        for kept, value in zip(mine, new, strict=True):
            kept.copy_(value, non_blocking=True)


def graphs_wanted(options: MachineOptions, place: Place) -> bool:
    """-> whether steps are to be captured."""
    return options.cuda_graph != "off" and not why_no_graph(place.device, place.world)


def graphed(
    step: Step, options: MachineOptions, place: Place, say: Callable[[str], None]
) -> Step | GraphedStep:
    """-> what the loop calls: `step`, or the same as a CUDA graph. say: what tells the user what was
    chosen."""
    if not graphs_wanted(options, place):
        return step
    return GraphedStep(step, Cuda(place.device), options.cuda_graph == "auto", say)
