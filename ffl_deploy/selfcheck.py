"""Before the first answer: does this very session give PyTorch's logits of the golden samples?

`ffl-verify` judges an installation by the same function. A verdict that holds is remembered for the bundle,
the file, the runtime, its threads, the gate and the processor (verdicts.py), so the next start costs nothing;
one that does not is found anew each time, and ends in a sentence that names a variant which holds here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ffl_deploy import verdicts
from ffl_deploy.errors import CheckError, FflError
from ffl_deploy.files import shown
from ffl_deploy.host import available_cores
from ffl_deploy.parity import PARITY_GATES, ParityGate, ParityRecord, gate_precision, judge
from ffl_deploy.probes import Probes, check_pixels
from ffl_deploy.processor import kernels
from ffl_deploy.runtime import Session, computes_on_cpu, runtime_named
from ffl_deploy.runtime.replay import golden_batches, measure

if TYPE_CHECKING:
    from ffl_deploy.bundle_files import BundleFiles
    from ffl_deploy.manifest import Variant

VERSION = 2
"""Of what is compared and how; another number makes every remembered verdict ask again.
The gates are part of the question."""


def golden_record(
    bundle: BundleFiles, variant: Variant, session: Session, batches: Sequence[int] | None = None
) -> ParityRecord:
    """Run the golden samples through `session`; -> metrics and verdict by the gate
    of the variant's precision.

    Args: batches: sizes to run at (1, 7 and all).
    Raises CheckError where the samples are damaged, or the session cannot run them.
    """
    golden, gate = bundle.golden(), gate_of(variant, session)
    images, logits = judged(golden.images, golden.logits, bundle.probes(), gate)
    sizes = golden_batches(len(images)) if batches is None else batches
    measured = measure(session.run, images, logits, sizes, bundle.temperature)
    return ParityRecord(gate, measured, judge(measured, gate))


def judged(
    images: np.ndarray, logits: np.ndarray, probes: Probes | None, gate: ParityGate
) -> tuple[np.ndarray, np.ndarray]:
    """-> the images and PyTorch's logits that `gate` is asked about: in fp32 those of the made-up pictures
    too.

    A coarser gate is a share of images like the run's own: scales are calibrated on those, and noise would
    say nothing about them. What such a file is made from has been held to fp32's.
    """
    if probes is None or gate.precision != "fp32":
        return images, logits
    known = np.isfinite(probes.logits).all(axis=1)  # export.golden: where fp32 says what they are
    return np.concatenate([images, probes.pixels[known]]), np.concatenate([logits, probes.logits[known]])


def gate_of(variant: Variant, session: Session) -> ParityGate:
    return PARITY_GATES[
        gate_precision(variant.precision.stored, session.computed or variant.precision.computed)
    ]


def require_golden(
    bundle: BundleFiles,
    variant: Variant,
    session: Session,
    threads: int | None = None,
    batches: Sequence[int] | None = None,
) -> None:
    """Let `session`, opened on `variant` with `threads`, answer; else close it. Arguments:
    as for `broken_gate`.

    Raises CheckError where its golden answers are not PyTorch's;
    the sentence names a variant that holds here.
    """
    broken = broken_gate(bundle, variant, session, threads, batches)
    if broken:
        session.close()
        raise refusal(bundle, variant, session.runtime, broken, threads)


def broken_gate(
    bundle: BundleFiles,
    variant: Variant,
    session: Session,
    threads: int | None = None,
    batches: Sequence[int] | None = None,
) -> str:
    """-> what of the gate `session` breaks, in words; "" where it holds,
    by a remembered verdict or by running the samples.

    Args: batches: sizes to run the samples at, now and whatever is remembered: a server's, which are its
    warm-up too. Raises CheckError where the samples are damaged.
    """
    question = _question(bundle, variant, session, threads) if batches is None else None
    if question is not None and verdicts.recall(question) == "passed":
        return ""
    bundle.golden()  # damaged samples are the bundle's fault, and no other variant helps
    check_preprocessing(bundle)
    try:
        record = golden_record(bundle, variant, session, batches)
    except CheckError as error:
        return str(error).rstrip(".")
    if question is not None and not record.verdict.failed:
        verdicts.remember(question, record.verdict.status)
    return reason(record)


def check_preprocessing(bundle: BundleFiles) -> bool:
    """-> whether the bundle holds pictures to see it by. Raises CheckError where this machine decodes or
    resizes otherwise than training did."""
    probes = bundle.probes()
    if probes is not None:
        check_pixels(probes, bundle.preprocessing, shown(bundle.folder))
    return probes is not None


def reason(record: ParityRecord) -> str:
    """-> each metric that broke its gate, as found with most images; "" where none did."""
    last = {finding.metric: finding for finding in record.verdict.findings}
    return "; ".join(
        f"{name} {finding.measured:.3g}, gate {finding.limit:g}" for name, finding in last.items()
    )


def refusal(
    bundle: BundleFiles, variant: Variant, runtime: str, broken: str, threads: int | None = None
) -> CheckError:
    """-> the sentence for a variant that does not hold here, with what to use in its place."""
    where = "processor" if computes_on_cpu(runtime) else "machine"
    holding = next(_holding(bundle, variant, runtime, threads), "")
    advice = (
        f"use {holding}, which holds here."
        if holding
        else "no variant of it holds here: export it again with ffl-export, or use another machine."
    )
    return CheckError(
        f"variant {variant.name} of {shown(bundle.folder)} does not give PyTorch's logits on this {where} "
        f"with {runtime} ({broken}); {advice}"
    )


def _holding(bundle: BundleFiles, refused: Variant, runtime: str, threads: int | None) -> Iterator[str]:
    """Yield the flags of what holds here: on the same runtime first, then on the variants' own,
    smaller files before larger."""
    others = sorted(bundle.manifest.variants, key=lambda variant: variant.bytes)
    same = [] if runtime_named(runtime).compiles else [(variant, runtime) for variant in others]
    tries = same + [(variant, variant.runtime) for variant in others]
    for variant, name in dict.fromkeys((variant.name, name) for variant, name in tries):
        if (variant, name) == (refused.name, runtime):
            continue
        candidate = bundle.variant(variant)
        try:
            session = bundle.open(variant, name, threads)
        except FflError:  # not installed, another machine's engine, a file that this runtime does not read
            continue
        broken = broken_gate(bundle, candidate, session, threads)
        session.close()
        if not broken:
            yield f"--variant {variant}" + (
                f" --runtime {name}" if name != candidate.runtime or variant == refused.name else ""
            )


def _question(
    bundle: BundleFiles, variant: Variant, session: Session, threads: int | None
) -> dict[str, Any] | None:
    """-> everything that a session's golden answers depend on; None where that is not known."""
    import PIL

    described = kernels(session.runtime)
    if described is None or not session.version:
        return None
    return {
        "asks": "golden samples",
        "check": VERSION,
        "bundle": bundle.sha256,
        "variant": variant.name,
        "file": variant.sha256,
        "runtime": [session.runtime, session.version, session.device],
        "computed": session.computed,
        "threads": threads or available_cores(),
        "gate": msgspec.to_builtins(gate_of(variant, session)),
        "processor": described,
        "pillow": PIL.__version__,
    }
