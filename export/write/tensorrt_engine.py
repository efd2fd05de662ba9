"""ONNX file -> TensorRT engine, one builder for both flavours: `tensorrt` (10.12+, 11) and `tensorrt_rtx`.

Networks are strongly typed: precision is the file's, there are no fp16 or int8 switches to be ignored.
`tensorrt_rtx` builds without a GPU, so this runs in the tests; `tensorrt` needs the GPU it builds for.
"""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import sha256_of, write_atomically, write_json
from ffl_deploy.installed import missing
from ffl_deploy.manifest import EngineRecord
from ffl_deploy.runtime.tensorrt_runtime import (
    checked,
    device_capability,
    import_cuda,
    import_tensorrt,
    message_collector,
)

RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
"""Built for by default: Ampere, Ada, Blackwell. Turing (7.5) has to be asked for:
it has no fp32 matrix product."""


@dataclass(frozen=True)
class EngineOptions:
    """flavour: tensorrt, tensorrt_rtx or None (the installed one); capabilities: None is the flavour's
    default; batches: the profile's min, opt and max."""

    flavour: str | None = None
    capabilities: tuple[str, ...] | None = None
    batches: tuple[int, int, int] = (1, 64, 256)


def installed_flavour() -> str:
    """-> the flavour that is installed, `tensorrt` first. Raises UsageError where none is."""
    for flavour in ("tensorrt", "tensorrt_rtx"):
        if importlib.util.find_spec(flavour) is not None:
            return flavour
    raise missing("tensorrt", "take the extra tensorrt-rtx (GeForce and RTX; it builds without a GPU)")


def build_engine(source: Path, path: Path, height: int, width: int, options: EngineOptions) -> EngineRecord:
    """Build `path` from the ONNX file `source`, with its record beside it (`path` with suffix .json).

    The source's SHA-256 is the network's name inside the engine. Raises CheckError with every message of
    parser and builder where TensorRT refuses, UsageError where a capability is not known to it.
    """
    flavour = options.flavour or installed_flavour()
    trt = import_tensorrt(flavour)
    log = message_collector(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)  # the network must outlive it, so both stay in this function
    if not parser.parse_from_file(str(source)):
        reasons = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)]
        raise CheckError(f"TensorRT cannot read {source.name}: {_text(reasons or log.errors)}")
    network.name = f"{source.name} sha256:{sha256_of(source)}"
    config = builder.create_builder_config()
    # on by default: fp32 files would be computed with 10-bit mantissas
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *((batch, height, width, 3) for batch in options.batches))
    if config.add_optimization_profile(profile) < 0:
        raise CheckError(f"TensorRT refuses the batch sizes {options.batches}: {_text(log.errors)}")
    capabilities, gpu = _set_capabilities(trt, config, flavour, options.capabilities), ""
    if not capabilities:  # it builds on, and for, the GPU that is here
        capabilities, gpu = this_gpu(flavour)
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    # An engine is the answer: TensorRT also logs, as an error,
    # every tactic that it tried and left out (NVIDIA/TensorRT #4028).
    if engine is None:
        wanted = f" for compute capability {', '.join(capabilities)}" if capabilities else ""
        raise CheckError(f"{flavour} cannot build {source.name}{wanted}: {_text(log.errors)}")
    record = EngineRecord(
        flavour=flavour,
        version=str(trt.__version__),
        compute_capabilities=capabilities,
        profile=dict(zip(("min", "opt", "max"), options.batches, strict=True)),
        source=source.name,
        source_sha256=sha256_of(source),
        platform=f"{platform.system()} {platform.machine()}",
        build_seconds=round(seconds, 3),
        log=[*log.warnings, *log.errors],
        gpu=gpu,
    )
    write_atomically(path, bytes(engine))
    write_json(path.with_suffix(".json"), record)
    return record


def _strongly_typed(trt: Any) -> int:
    """-> creation flags: needed on 10.12+, the only kind (and gone as a flag in the end) on later ones."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _set_capabilities(trt: Any, config: Any, flavour: str, wanted: Sequence[str] | None) -> list[str]:
    """Set the target GPUs; -> them as "8.9". `tensorrt` builds for the GPU
    of this machine unless told otherwise."""
    names = list(wanted if wanted is not None else RTX_CAPABILITIES if flavour == "tensorrt_rtx" else ())
    if not names:
        return []
    members = trt.ComputeCapability.__members__ if hasattr(trt, "ComputeCapability") else {}
    known = {f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if name.startswith("SM")}
    if not known:
        raise UsageError(
            f"{flavour} {trt.__version__} builds for this machine's GPU only; leave --compute-capability out."
        )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            f"{flavour} {trt.__version__} does not build for compute capability {unknown[0]}; known: "
            f"{', '.join(sorted(known))}."
        )
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        if not config.set_compute_capability(known[name], index):
            raise CheckError(f"{flavour} refuses to build for compute capability {name}.")
    return names


def this_gpu(flavour: str) -> tuple[list[str], str]:
    """-> (its compute capability as ["8.9"], its name). Raises UsageError where there is none."""
    cuda = import_cuda()
    advice = f"{flavour} builds on the GPU that the engine is for: leave --tensorrt out here, or export there"
    major, minor = device_capability(cuda, advice)
    name = checked(cuda, cuda.cudaGetDeviceProperties(0)).name
    return [f"{major}.{minor}"], name.decode() if isinstance(name, bytes) else str(name)


def _text(messages: Sequence[str]) -> str:
    """-> the messages on one line, without repeats and without CUDA's complaint
    that a builder's machine has no GPU."""
    lines = [" ".join(line.split()) for message in messages for line in message.splitlines()]
    kept = [line for line in dict.fromkeys(lines) if line and "catchCudaError" not in line]
    return "; ".join(kept) or "it gave no reason"
