"""What engines hold of the GPU's memory goes back; and where TensorRT is installed, an engine is built and
used."""

from __future__ import annotations

import gc
import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.gpu_acceptance.report import Context
from benchmarks.gpu_acceptance.training import module, sentence
from benchmarks.gpu_acceptance.training import run as start

VERSION, SIZE, CLASSES = "10.13.3.9", (32, 32, 3), 10
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

    sys.modules["tensorrt"] = stand_in()
    from ffl_deploy.manifest import EngineRecord, Precision, Variant
    from ffl_deploy.runtime.gpu import this_gpu
    from ffl_deploy.runtime.tensorrt_cache import Engine
    from ffl_deploy.runtime.tensorrt_runtime import TensorRtSession

    record = EngineRecord(
        "tensorrt", VERSION, [this_gpu().compute_capability], {"min": 1, "opt": 4, "max": 256}, "model.onnx",
        "0" * 64, "Linux x86_64", 1.0, [],
    )  # fmt: skip
    engine = Engine(b"an engine", record, "a stand-in", "this is a test")
    variant = Variant("fp32-engine", "tensorrt", "fp32.engine", "0", 9, Precision("fp32", "fp32"))

    def use() -> TensorRtSession:
        session = TensorRtSession(engine, variant)
        answers = session.run(np.zeros((200, *SIZE), np.uint8))
        context.report.must("answers for every image", answers.logits.shape == (200, CLASSES))
        return session

    use().close()
    gc.collect()
    before = free(cuda)
    for number in range(SESSIONS):
        session = use()
        if number % 2:  # the others are forgotten, which has to do
            session.close()
    del session
    gc.collect()
    with ThreadPoolExecutor(8) as pool:
        for closed in [pool.submit(lambda: use().close()) for _ in range(SESSIONS)]:
            closed.result()
    gc.collect()
    after = free(cuda)
    context.report.note(free_before_mib=before >> 20, free_after_mib=after >> 20)
    context.report.must("the memory is free again", after >= before - SLACK)


def free(cuda: Any) -> int:
    return int(cuda.cudaMemGetInfo()[1])


def stand_in() -> ModuleType:
    """-> a module `tensorrt` whose engines take images, compute nothing and answer with what the buffers
    hold."""
    module: Any = ModuleType("tensorrt")
    shapes = {
        "images": ((-1, *SIZE), np.uint8, 0),
        "logits": ((-1, CLASSES), np.float32, 1),
        "probabilities": ((-1, CLASSES), np.float32, 1),
    }

    class Logger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    class Anything:
        """A context: takes every call."""

        def __getattr__(self, name: str) -> Any:
            return lambda *_: True

    engine = SimpleNamespace(
        num_io_tensors=len(shapes),
        get_tensor_name=lambda index: list(shapes)[index],
        get_tensor_shape=lambda name: shapes[name][0],
        get_tensor_dtype=lambda name: shapes[name][1],
        get_tensor_mode=lambda name: shapes[name][2],
        create_execution_context=Anything,
    )
    module.__version__, module.ILogger, module.nptype = VERSION, Logger, lambda kind: kind
    module.TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)
    module.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=lambda content: engine)
    return module
