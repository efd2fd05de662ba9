"""Several processes: they train as one, and where one fails all of them end."""

from __future__ import annotations

import os
import socket
import sys
import time

from benchmarks.gpu_acceptance.report import Context
from benchmarks.gpu_acceptance.training import run as start
from benchmarks.gpu_acceptance.training import sentence

LIMIT = 60
# Two processes on one GPU speak gloo, since NCCL wants a GPU for each.
SCRIPT = """
import os, sys
import train.distributed, train.session
from train.distributed import World
one_gpu, failing = os.environ["ONE_GPU"] == "1", os.environ["FAILING"] == "1"
if one_gpu:
    world = train.distributed.torchrun_world()
    train.session.torchrun_world = lambda: World(world.rank, world.size, 0)
    start = train.distributed.distributed.init_process_group
    train.distributed.distributed.init_process_group = lambda *_, **__: start("gloo")
if failing and os.environ["RANK"] == "1":
    import train.loop
    def fails(trainer, number, batches, step=train.loop.Trainer.step):
        if number == 3:
            raise MemoryError
        step(trainer, number, batches)
    train.loop.Trainer.step = fails
from train.run import entry
entry()
"""


def run(context: Context) -> None:
    script = context.work / "two.py"
    script.write_text(SCRIPT)
    batchnorm = ["--sync-batchnorm"] if context.gpu else []
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += [str(script), "--data", "digits", "--device", context.device, "--precision", "fp32", "--quiet"]
    launch += [*context.size(1), *batchnorm]
    for name, failing in (("two processes", "0"), ("one of two fails", "1")):
        begun, out = time.monotonic(), context.work / f"processes-{failing}"
        environment = {"ONE_GPU": "1" if context.gpu else "0", "FAILING": failing, "OMP_NUM_THREADS": "1"}
        done = start([*launch, "--out", str(out)], timeout=10 * LIMIT, **environment)
        seconds = time.monotonic() - begun
        context.report.note(**{f"{name}: seconds": round(seconds, 1), f"{name}: code": done.returncode})
        context.report.must(f"{name}: as it should end", (done.returncode == 0) == (failing == "0"))
        if failing == "1":
            context.report.must("no process waits for one that failed", seconds < LIMIT or not context.gpu)
        elif done.returncode:
            context.report.note(said=sentence(done))
    if context.gpu:
        nccl(context)
        context.report.leave_out("one process of NCCL that fails: needs two GPUs")
    else:
        context.report.leave_out("NCCL, synchronised batch statistics: need a GPU")


def nccl(context: Context) -> None:
    """A group of one: NCCL loads, and a step of DistributedDataParallel runs."""
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    device = torch.device("cuda", 0)
    distributed.init_process_group("nccl", rank=0, world_size=1, device_id=device)
    network = DistributedDataParallel(torch.nn.SyncBatchNorm(4).to(device), device_ids=[device])
    network(torch.randn(8, 4, 2, 2, device=device)).square().sum().backward()
    torch.cuda.synchronize()
    context.report.must("NCCL: a step", all(value.grad is not None for value in network.parameters()))
    context.report.note(nccl=".".join(map(str, torch.cuda.nccl.version())))
    distributed.destroy_process_group()
