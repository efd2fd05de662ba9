"""ONNX file -> TensorRT engine, one builder for both flavours: `tensorrt` (10.12+, 11) and `tensorrt_rtx`.

Networks are strongly typed: precision is the file's, there are no fp16 or int8 switches to be ignored.
`tensorrt_rtx` builds without a GPU, so this runs in the tests; `tensorrt` needs the GPU it builds for.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import sha256_of
from ffl_deploy.manifest import EngineRecord
from ffl_deploy.runtime.gpu import Gpu, this_gpu
from ffl_deploy.runtime.tensorrt_modules import (
    import_tensorrt,
    installed_flavour,
    message_collector,
    one_line,
)

BATCHES = (1, 8, 256)
"""What an engine is optimized for: a lone request, a small batch, and a full one."""
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
"""Built for by default: Ampere, Ada, Blackwell. Turing (7.5) has to be asked for:
it has no fp32 matrix product."""


@dataclass(frozen=True)
class EngineOptions:
    """flavour: tensorrt, tensorrt_rtx or None (the installed one); capabilities: None is the flavour's
    default; batches: sizes to optimize for, the largest of which is the largest that the engine takes;
    timings: what earlier builds on this GPU found of its kernels (`Built.timings`)."""

    flavour: str | None = None
    capabilities: tuple[str, ...] | None = None
    batches: tuple[int, ...] = BATCHES
    timings: bytes | None = None


def require_targets(options: EngineOptions) -> None:
    """Raise UsageError, before any work, where engines cannot be built for the GPUs that are asked for."""
    flavour = options.flavour or installed_flavour()
    _Targets(flavour, import_tensorrt(flavour), options.capabilities)


class Built(NamedTuple):
    """timings: what to give the next build on this GPU; None where this flavour times nothing."""

    content: bytes
    record: EngineRecord
    timings: bytes | None


def build(source: Path, options: EngineOptions) -> Built:
    """-> an engine of the ONNX file `source`, with what it was built by and for.

    The source's SHA-256 is the network's name inside the engine. Raises CheckError with every message of
    parser and builder where TensorRT refuses, UsageError where a capability is not known to it or the GPU is
    not there.
    """
    flavour = options.flavour or installed_flavour()
    trt = import_tensorrt(flavour)
    log = message_collector(trt)
    # before TensorRT touches the GPU: it has a sentence
    config_of = _Targets(flavour, trt, options.capabilities)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)  # the network must outlive it, so both stay in this function
    if not parser.parse_from_file(str(source)):
        reasons = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)]
        raise CheckError(f"TensorRT cannot read {source.name}: {one_line(reasons or log.errors)}")
    digest = sha256_of(source)
    network.name = f"{source.name} sha256:{digest}"

    # precision, batch sizes, GPUs, and what is known of their kernels
    config = builder.create_builder_config()
    # on by default: fp32 files would be computed with 10-bit mantissas
    config.clear_flag(trt.BuilderFlag.TF32)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    batch = int(inputs[0].shape[0])
    profiles = profiles_for(options.batches, None if batch < 0 else batch)
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            row = tuple(int(size) for size in tensor.shape)[1:]
            profile.set_shape(tensor.name, *((batch, *row) for batch in sizes))
        if config.add_optimization_profile(profile) < 0:
            raise CheckError(f"TensorRT refuses the batch sizes {sizes}: {one_line(log.errors)}")
    config_of.set(config)
    _use_timings(config, flavour, options.timings)

    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    # An engine is the answer: TensorRT also logs, as an error,
    # every tactic that it tried and left out (NVIDIA/TensorRT #4028).
    if engine is None:
        wanted = f" for compute capability {', '.join(config_of.names)}" if config_of.names else ""
        raise CheckError(f"{flavour} cannot build {source.name}{wanted}: {one_line(log.errors)}")
    record = EngineRecord(
        flavour=flavour,
        version=str(trt.__version__),
        compute_capabilities=config_of.names,
        profile={"min": profiles[0][0], "opt": profiles[-1][1], "max": profiles[-1][2]},
        source=source.name,
        source_sha256=digest,
        platform=f"{platform.system()} {platform.machine()}",
        build_seconds=round(seconds, 3),
        log=[*log.warnings, *log.errors],
        gpu=config_of.gpu.name if config_of.gpu else "",
        profiles=[list(sizes) for sizes in profiles],
    )
    return Built(bytes(engine), record, _timings(config, flavour))


def profiles_for(batches: Sequence[int], fixed: int | None = None) -> list[tuple[int, int, int]]:
    """-> (least, best, largest) batch of each optimization profile: together every size from 1 to the
    largest.

    fixed: the only size that the network takes. (1, 8, 256) -> [(1, 1, 1), (2, 8, 8), (9, 256, 256)].
    """
    if fixed is not None:
        return [(fixed, fixed, fixed)]
    sizes = sorted(set(batches))
    return [(least + 1, size, size) for least, size in pairwise([0, *sizes])]


def _strongly_typed(trt: Any) -> int:
    """-> creation flags: needed on 10.12+, the only kind (and gone as a flag in the end) on later ones."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


class _Targets:
    """The GPUs to build for. `names`: their capabilities; `gpu`: this machine's, where it builds on and for
    that.

    `tensorrt` does so unless it was told otherwise. Raises UsageError.
    """

    def __init__(self, flavour: str, trt: Any, wanted: Sequence[str] | None) -> None:
        self._flavour, self._members = flavour, {}
        self.gpu: Gpu | None = None
        self.names = list(
            wanted if wanted is not None else RTX_CAPABILITIES if flavour == "tensorrt_rtx" else ()
        )
        if not self.names:
            self.gpu = this_gpu(f"{flavour} builds on the GPU that the engine is for: build it there")
            self.names = [self.gpu.compute_capability]
            return
        members = trt.ComputeCapability.__members__ if hasattr(trt, "ComputeCapability") else {}
        self._members = {
            f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if name.startswith("SM")
        }
        if not self._members:
            raise UsageError(
                f"{flavour} {trt.__version__} builds for this machine's GPU only; leave --compute-capability "
                "out."
            )
        unknown = [name for name in self.names if name not in self._members]
        if unknown:
            raise UsageError(
                f"{flavour} {trt.__version__} does not build for compute capability {unknown[0]}; known: "
                f"{', '.join(sorted(self._members))}."
            )

    def set(self, config: Any) -> None:
        """Tell the builder. Raises CheckError where it refuses."""
        if self.gpu is not None:
            return
        config.num_compute_capabilities = len(self.names)
        for index, name in enumerate(self.names):
            if not config.set_compute_capability(self._members[name], index):
                raise CheckError(f"{self._flavour} refuses to build for compute capability {name}.")


def _use_timings(config: Any, flavour: str, timings: bytes | None) -> None:
    """Start from what earlier builds timed. TensorRT-RTX times nothing when it builds: it compiles where it
    runs."""
    if flavour == "tensorrt":
        config.set_timing_cache(config.create_timing_cache(timings or b""), False)


def _timings(config: Any, flavour: str) -> bytes | None:
    return bytes(config.get_timing_cache().serialize()) if flavour == "tensorrt" else None
