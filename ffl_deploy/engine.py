"""`ffl-engine BUNDLE`: build a TensorRT engine for this machine's GPU, and see that it gives PyTorch's
answers.

It takes the bundle alone: neither torch nor the run that it was exported from. The engine is kept in the
user's cache, where `ffl-predict`, `ffl-serve` and `load_bundle(...).predict(...)` find it with `--runtime
tensorrt`; they build it themselves where nobody did before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.bundle_checks import summary
from ffl_deploy.command import Parser, gpu_number, run_command
from ffl_deploy.errors import DONE, UsageError
from ffl_deploy.files import shown
from ffl_deploy.selfcheck import check_preprocessing, golden_record, reason, refusal

SECONDS = 0.3  # of measurement at each batch size


def build_and_verify(
    bundle: Bundle, variant: str | None = None, batches: tuple[int, ...] | None = None
) -> Iterator[str]:
    """Build the engine of `variant` (fp32) again, whether or not one was kept, and hold it to its gate on the
    golden samples; yield a line for people after each step.

    Args: batches: sizes to optimize it for; the largest is the largest that it takes (1, 8, 256). Raises
    UsageError where TensorRT or a GPU is missing or the variant is no ONNX file, CheckError where TensorRT
    refuses it or its answers are not PyTorch's: the engine is then not kept.
    """
    from ffl_deploy.runtime.gpu import this_gpu
    from ffl_deploy.runtime.latency import measure_latency
    from ffl_deploy.runtime.onnx_wire import refuse_external_data
    from ffl_deploy.runtime.operators import refuse_foreign_operators
    from ffl_deploy.runtime.registry import NO_CASCADE
    from ffl_deploy.runtime.session import FixedBatchSession, Session
    from ffl_deploy.runtime.tensorrt_cache import engine_here, forget
    from ffl_deploy.runtime.tensorrt_runtime import TensorRtSession

    chosen = bundle.variant(variant)
    if not chosen.file.endswith(".onnx"):
        raise UsageError(
            f"variant {chosen.name} of {shown(bundle.folder)} is an engine already; give the --variant of "
            "an ONNX file."
        )
    if chosen.exits:
        raise UsageError(NO_CASCADE)
    source = bundle.checked_file(chosen.file)
    refuse_external_data(source)
    refuse_foreign_operators(source)
    check_preprocessing(bundle)
    gpu = this_gpu()
    yield f"{shown(bundle.folder)}: {chosen.name} for {gpu}"

    engine = engine_here(source, batches, again=True)
    record = engine.record
    sizes = [best for _, best, _ in record.profiles]
    yield (
        f"built by {record.flavour} {record.version} in {record.build_seconds:.1f} s for batches "
        f"{', '.join(map(str, sizes))} ({len(engine.content) / 1e6:.1f} MB), "
        + (f"kept in {shown(engine.place.parent)}" if engine.place else "not kept: no private cache folder")
    )

    session: Session = TensorRtSession(engine, chosen)
    if bundle.manifest.input.batch:
        session = FixedBatchSession(session, bundle.manifest.input.batch)
    try:
        found = golden_record(bundle, chosen, session)
        if found.verdict.failed:
            forget(engine)
            raise refusal(bundle, chosen, session.runtime, reason(found))
        yield f"{chosen.name} on tensorrt: {summary(found)}"
        images = bundle.golden().images
        latency = measure_latency(session.run, images, sizes, SECONDS, gpu=session.gpu)
        rates = ", ".join(f"{rate:.0f} at batch {size}" for size, rate in latency.images_per_second.items())
        yield f"{latency.p50_ms:.3f} ms for one image; images/s: {rates}"
    finally:
        session.close()


def batch_sizes(text: str) -> tuple[int, ...]:
    """-> "1,8,64" as numbers; as a `type` of argparse, which puts the flag before the sentence."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of batch sizes such as 1,8,64")
    return sizes


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="ffl-engine",
        examples=(
            "ffl-engine bundles/flowers/fused",
            "ffl-engine bundles/flowers/fused --variant fp16 --device 1 --batches 1,8,64",
        ),
        description=(
            "Build a TensorRT engine of a bundle's model for this machine's GPU, verify it on the golden "
            "samples, and keep it for --runtime tensorrt."
        ),
        epilog=(
            "Exit: 0 built and verified; 1 it does not give PyTorch's answers, or cannot be built; 2 no "
            "GPU, no TensorRT, unusable flags. See docs/gpu.md."
        ),
    )
    parser.add_argument(
        "bundle", metavar="BUNDLE", help="the folder that ffl-export wrote (it holds bundle.json)"
    )
    parser.add_argument("--variant", metavar="NAME", help="the file to build from (default: fp32)")
    parser.add_argument(
        "--device",
        metavar="N",
        type=gpu_number,
        help="the GPU to build on, as nvidia-smi counts (default: the first)",
    )
    parser.add_argument(
        "--batches",
        metavar="N,N,...",
        type=batch_sizes,
        help="batch sizes to optimize for; larger batches run in pieces of the largest (default: 1,8,256)",
    )
    arguments = parser.parse_args(argv)
    if arguments.device is not None:
        from ffl_deploy.runtime.gpu import use_gpu

        use_gpu(arguments.device)
    bundle = load_bundle(arguments.bundle)
    for line in build_and_verify(bundle, arguments.variant, arguments.batches):
        print(line, flush=True)
    return DONE


def entry() -> None:
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
