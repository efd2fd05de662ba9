"""How much faster the exported files are than PyTorch, and what our session costs over a bare loop.

    python benchmarks/export_speed.py [--branches resnet32,resnet32] [--classes 100] [--size 32] [--rounds 9]

Everything is measured in turns, in one process, on the same images, and compared round by round: on a shared
machine only the ratios mean something. The weights are random (speed does not depend on them); BatchNorm
statistics are those of noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.write.half import write_half
from export.write.int8_choice import Held, Judges
from export.write.onnx_graph import DeployedModel, GraphOptions, write_onnx
from export.write.quantize import quantize
from ffl_deploy.host import available_cores
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from ffl_deploy.networks.targets import build_target, target_names
from ffl_deploy.runtime import OnnxRuntimeSession
from ffl_deploy.runtime.latency import machine_name
from ffl_deploy.runtime.openvino_runtime import OpenVinoSession
from ffl_deploy.runtime.tensorrt_build import EngineOptions
from ffl_deploy.runtime.tensorrt_build import build as build_engine

MEAN, STD = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)
Call = Callable[[np.ndarray], Any]


def build(
    folder: Path, branches: tuple[str, ...], classes: int, size: int
) -> tuple[DeployedModel, MutualNetwork, np.ndarray]:
    """Write fp32, bf16 and both int8 files of the fused target; -> (model, network, smooth noise images)."""
    torch.manual_seed(0)
    network = MutualNetwork(NetworkConfig(branches, classes, size, size))
    network.train()
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(64, 3, size, size))
    model = DeployedModel(build_target(network.eval(), "fused"), MEAN, STD).eval()
    blocks = np.random.default_rng(0).integers(0, 256, (256, size // 4, size // 4, 3))
    images = np.kron(blocks, np.ones((1, 4, 4, 1))).astype(np.uint8)
    write_onnx(model, folder / "model.onnx", size, size, GraphOptions(), {})
    write_half(folder / "model.onnx", folder / "model.bf16.onnx", "bf16")
    with torch.inference_mode():
        logits = model(torch.from_numpy(images))[0].numpy()
    held = Held(images[:64], logits[:64])
    quantize(folder / "model.onnx", folder, images, Judges(held, held))
    return model, network, images


def candidates(folder: Path, model: DeployedModel, threads: int) -> dict[str, Call]:
    """-> name -> what runs one batch."""
    fast = DeployedModel(copy.deepcopy(model.target), MEAN, STD).eval().to(memory_format=torch.channels_last)

    def eager(images: np.ndarray) -> Any:
        """PyTorch's default layout, NCHW; the pixels' own order would make it channels_last."""
        with torch.inference_mode():
            logits = model.target(model.normalise(torch.from_numpy(images)).contiguous())
            return logits, torch.softmax(logits, dim=1)

    def channels_last(images: np.ndarray) -> Any:
        with torch.inference_mode():
            return fast(torch.from_numpy(images))

    fp32 = OnnxRuntimeSession(folder / "model.onnx", "fp32", threads)
    int8 = OnnxRuntimeSession(folder / "model.int8.onnx", "int8", threads)
    return {
        "PyTorch eager": eager,
        "PyTorch channels_last": channels_last,
        "ONNX Runtime fp32": fp32.run,
        "ONNX Runtime int8": int8.run,
        "OpenVINO fp32": OpenVinoSession(folder / "model.onnx", "fp32", threads).run,
        "OpenVINO int8": OpenVinoSession(folder / "model.int8.onnx", "int8", threads).run,
        "OpenVINO bf16": OpenVinoSession(folder / "model.bf16.onnx", "bf16", threads, "bf16").run,
    }


def session_over_bare_loop(path: Path, images: np.ndarray, threads: int, calls: int) -> float:
    """-> median time of our session's call over that of ONNX Runtime's own,
    call by call in changing order."""
    session = OnnxRuntimeSession(path, "variant", threads)
    bare: Call = lambda images: session._session.run(None, {"images": images})  # noqa: E731 - the same graph, the same threads
    taken: dict[Call, list[float]] = {session.run: [], bare: []}
    for turn in range(calls + 5):
        for call in (session.run, bare) if turn % 2 else (bare, session.run):
            start = time.perf_counter()
            call(images)
            if turn >= 5:  # warm by now
                taken[call].append(time.perf_counter() - start)
    return round(float(np.median(taken[session.run]) / np.median(taken[bare])), 4)


def in_turns(calls: dict[str, Call], images: np.ndarray, rounds: int, repeats: int) -> dict[str, np.ndarray]:
    """-> name -> seconds per call, the least of `repeats` calls in each of the rounds."""
    for call in calls.values():
        for _ in range(2):
            call(images)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            least = float("inf")
            for _ in range(repeats):
                start = time.perf_counter()
                call(images)
                least = min(least, time.perf_counter() - start)
            taken[name].append(least)
    return {name: np.array(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Speed of the exported files against PyTorch and against a bare loop."
    )
    parser.add_argument("--branches", default="resnet32,resnet32")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--engines", action="store_true", help="also time building a TensorRT-RTX engine of each target"
    )
    parser.add_argument(
        "--threads", type=int, default=available_cores(), help="1 is robust on a busy machine"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "machine": machine_name(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, network, images = build(
            folder, tuple(arguments.branches.split(",")), arguments.classes, arguments.size
        )
        calls = candidates(folder, model, arguments.threads)
        for batch, repeats in ((1, 10), (64, 2)):
            taken = in_turns(calls, images[:batch], arguments.rounds, repeats)
            result[f"batch {batch}"] = {
                name: {
                    "ms": round(float(np.median(values)) * 1e3, 3),
                    "images_per_second": round(batch / float(np.median(values)), 1),
                    "times_pytorch_eager": round(float(np.median(taken["PyTorch eager"] / values)), 2),
                    "times_onnxruntime_fp32": round(float(np.median(taken["ONNX Runtime fp32"] / values)), 2),
                }
                for name, values in taken.items()
            }
            result[f"batch {batch}"]["session over bare loop"] = {
                form: session_over_bare_loop(
                    folder / file, images[:batch], arguments.threads, calls=400 if batch == 1 else 40
                )
                for form, file in (("fp32", "model.onnx"), ("int8", "model.int8.onnx"))
            }
            # a long run shows its progress
            print(json.dumps(result[f"batch {batch}"], indent=1), file=sys.stderr, flush=True)
        if arguments.engines:
            result["TensorRT-RTX build seconds"] = engine_seconds(folder, network, arguments.size)
    print(json.dumps(result, indent=1))


def engine_seconds(folder: Path, network: MutualNetwork, size: int) -> dict[str, float]:
    """-> target -> seconds to build its fp32 engine for Ampere, Ada and Blackwell."""
    seconds = {}
    for name in target_names(network):
        path = folder / f"{name}.onnx"
        write_onnx(
            DeployedModel(build_target(network, name), MEAN, STD).eval(), path, size, size, GraphOptions(), {}
        )
        start = time.perf_counter()
        build_engine(path, EngineOptions("tensorrt_rtx"))
        seconds[name] = round(time.perf_counter() - start, 2)
    return seconds


if __name__ == "__main__":
    main()
