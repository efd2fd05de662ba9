"""How much faster the exported files are than PyTorch, and what our session costs over a bare loop.

    python benchmarks/export_speed.py [--branches resnet32,resnet32] [--classes 100] [--size 32] [--rounds 9]

Everything is measured in turns, in one process, on the same images, and compared round by round: on a shared machine only the
ratios mean something. The weights are random (speed does not depend on them); BatchNorm statistics are those of noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.half import write_half
from export.latency import machine_name
from export.onnx_graph import DeployedModel, GraphOptions, write_onnx
from export.quantize import Held, quantise
from export.tensorrt_engine import EngineOptions, build_engine
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from ffl_deploy.networks.targets import build_target, target_names
from ffl_deploy.runtime import OnnxRuntimeSession, available_cores
from ffl_deploy.runtime.openvino_runtime import OpenVinoSession

MEAN, STD = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)
Call = Callable[[np.ndarray], Any]


def build(folder: Path, branches: tuple[str, ...], classes: int, size: int) -> tuple[DeployedModel, MutualNetwork, np.ndarray]:
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
    quantise(folder / "model.onnx", folder, images, Held(images[:64], logits[:64]))
    return model, network, images


def candidates(folder: Path, model: DeployedModel) -> dict[str, Call]:
    """-> name -> what runs one batch."""
    fast = DeployedModel(model.target, MEAN, STD).eval().to(memory_format=torch.channels_last)

    def eager(images: np.ndarray) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(images))

    def channels_last(images: np.ndarray) -> Any:
        with torch.inference_mode():
            return fast(torch.from_numpy(images))

    fp32, int8 = OnnxRuntimeSession(folder / "model.onnx", "fp32"), OnnxRuntimeSession(folder / "model.int8.onnx", "int8")
    return {
        "PyTorch eager": eager,
        "PyTorch channels_last": channels_last,
        "ONNX Runtime fp32": fp32.run,
        "ONNX Runtime fp32, bare": lambda images: fp32._session.run(None, {"images": images}),
        "ONNX Runtime int8": int8.run,
        "ONNX Runtime int8, bare": lambda images: int8._session.run(None, {"images": images}),
        "OpenVINO fp32": OpenVinoSession(folder / "model.onnx", "fp32").run,
        "OpenVINO int8": OpenVinoSession(folder / "model.int8.onnx", "int8").run,
        "OpenVINO bf16": OpenVinoSession(folder / "model.bf16.onnx", "bf16", precision="bf16").run,
    }


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
    parser = argparse.ArgumentParser(description="Speed of the exported files against PyTorch and against a bare loop.")
    parser.add_argument("--branches", default="resnet32,resnet32")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--engines", action="store_true", help="also time building a TensorRT-RTX engine of each target")
    arguments = parser.parse_args()
    torch.set_num_threads(available_cores())
    result: dict[str, Any] = {"machine": machine_name(), "threads": available_cores(), "rounds": arguments.rounds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, network, images = build(folder, tuple(arguments.branches.split(",")), arguments.classes, arguments.size)
        calls = candidates(folder, model)
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
                form: round(float(np.median(taken[f"ONNX Runtime {form}"] / taken[f"ONNX Runtime {form}, bare"])), 4)
                for form in ("fp32", "int8")
            }
            print(json.dumps(result[f"batch {batch}"], indent=1), file=sys.stderr, flush=True)  # a long run shows its progress
        if arguments.engines:
            result["TensorRT-RTX build seconds"] = engine_seconds(folder, network, arguments.size)
    print(json.dumps(result, indent=1))


def engine_seconds(folder: Path, network: MutualNetwork, size: int) -> dict[str, float]:
    """-> target -> seconds to build its fp32 engine for Ampere, Ada and Blackwell."""
    seconds = {}
    for name in target_names(network):
        path = folder / f"{name}.onnx"
        write_onnx(DeployedModel(build_target(network, name), MEAN, STD).eval(), path, size, size, GraphOptions(), {})
        start = time.perf_counter()
        build_engine(path, path.with_suffix(".engine"), size, size, EngineOptions("tensorrt_rtx"))
        seconds[name] = round(time.perf_counter() - start, 2)
    return seconds


if __name__ == "__main__":
    main()
