"""The stages, the most valuable first. A stage is a module of `checks` with `run(context)`."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """limit: seconds; needs_gpu: whether it has nothing to do without one; alone: whether it measures time or
    memory, which others beside it would change."""

    name: str
    limit: int
    needs_gpu: bool
    does: str
    must_hold: str
    alone: bool = True


GPU, CPU = True, False
BESIDE = False

STAGES = (
    Stage("machine", 15, CPU, "GPU, driver, versions, free memory", "torch sees the GPU"),
    # beside each other
    Stage(
        "chain", 110, CPU, "digits trained in fp32, bf16, fp16; exported, verified, predicted",
        "every exit code is 0", BESIDE,
    ),
    Stage(
        "exactness", 40, GPU, "reference logits of the GPU against those of the CPU, TF32 on and off",
        "without TF32 at most 2e-5 of their standard deviation", BESIDE,
    ),
    Stage(
        "tests", 110, GPU, "pytest -m gpu tests/train tests/export",
        "all pass, none is skipped but TensorRT-RTX's", BESIDE,
    ),
    Stage(
        "resume", 90, CPU, "SIGTERM in an epoch, kill in a save, --deterministic",
        "resumed, with the same bits", BESIDE,
    ),
    Stage("processes", 70, CPU, "two processes, one that fails; NCCL", "all end within 60 seconds", BESIDE),
    Stage(
        "learning", 110, CPU, "ours and the official code for some epochs, two seeds",
        "means within 2 points", BESIDE,
    ),
    # one after the other
    Stage(
        "speed", 120, CPU, "ours in every precision, as it is, as a CUDA graph, compiled; the official code",
        "auto within 5 % of the best that it chooses from; not slower than the official code",
    ),
    Stage("waits", 60, GPU, "steps in which a wait is an error; what a step launches", "no wait"),
    Stage("bound", 45, GPU, "kernels alone, launches alone, the network alone", "nothing; shares are told"),
    Stage("streaming", 30, CPU, "JPEGs from disk through worker processes", "no process is left behind"),
    Stage("faults", 30, CPU, "out of memory, NaN", "one sentence, its exit code, memory given back"),
    Stage(
        "buffers", 20, GPU, "engines' buffers on the GPU; ffl-engine where TensorRT is",
        "memory is given back",
    ),
)  # fmt: skip
