"""What engines hold of the GPU's memory goes back; and where TensorRT is installed, an engine is built and
used."""

from __future__ import annotations

import gc
import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.gpu_acceptance.report import Context
from benchmarks.gpu_acceptance.training import module, sentence
from benchmarks.gpu_acceptance.training import run as start

SESSIONS = 100
SLACK = 64 * 2**20  # bytes: CUDA keeps some for itself


def run(context: Context) -> None:
    context.need_gpu()
    for flavour in ("tensorrt", "tensorrt_rtx"):
        if importlib.util.find_spec(flavour) is None:
            context.report.leave_out(f"engines of {flavour}: not installed here")
        else:
            engines(context)
            break
    if importlib.util.find_spec("cuda") is None:
        context.report.leave_out("buffers: cuda-bindings is not installed here")
        return
    buffers(context)


def engines(context: Context) -> None:
    """ffl-engine on the bundle that stage `chain` left."""
    bundle = context.work / "chain-fp32" / "bundles" / "fused"
    if not bundle.is_dir():
        context.report.leave_out("engines: stage chain left no bundle")
        return
    done = start(module("ffl_deploy.engine", str(bundle)))
    context.report.note(ffl_engine=sentence(done) or done.stdout.strip().splitlines()[-1:])
    context.report.must("ffl-engine ends with 0", done.returncode == 0)


def buffers(context: Context) -> None:
    """A stand-in for TensorRT on the real CUDA runtime."""
    from cuda.bindings import runtime as cuda

    from tests.ffl_deploy import stub_tensorrt
    from tests.ffl_deploy.test_tensorrt_stub import RECORD, VERSION, variant

    stub: ModuleType = stub_tensorrt.tensorrt(VERSION)
    sys.modules["tensorrt"] = stub
    from ffl_deploy.runtime.tensorrt_runtime import TensorRtSession, device_capability

    capability = ".".join(map(str, device_capability(cuda)))
    path = context.work / "stub.engine"
    path.write_bytes(b"an engine")
    profile = {"min": 1, "opt": 4, "max": 256}
    record = variant(**{**RECORD, "compute_capabilities": [capability], "profile": profile})
    use(path, record, TensorRtSession).close()
    gc.collect()
    before = free(cuda)
    for number in range(SESSIONS):
        session = use(path, record, TensorRtSession)
        if number % 2:  # the others are forgotten, which has to do
            session.close()
    del session
    gc.collect()
    with ThreadPoolExecutor(8) as pool:
        for closed in [
            pool.submit(lambda: use(path, record, TensorRtSession).close()) for _ in range(SESSIONS)
        ]:
            closed.result()
    gc.collect()
    after = free(cuda)
    context.report.note(free_before_mib=before >> 20, free_after_mib=after >> 20)
    context.report.must("the memory is free again", after >= before - SLACK)


def use(path: Path, record: Any, kind: Any) -> Any:
    session = kind(path, record)
    session.run(np.zeros((200, 32, 32, 3), np.uint8))
    return session


def free(cuda: Any) -> int:
    return int(cuda.cudaMemGetInfo()[1])
