"""Is this the bundle that was exported, and does this machine compute what training computed?

Checks, in this order: the manifest's schema and names; that the folder holds every listed file, unchanged,
and no other; that no model keeps data elsewhere, and each carries the classes, preprocessing and temperature
that the manifest gives; that pictures are decoded and resized as in training; the golden samples on the
runtime that is installed. Needs neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ffl_deploy.bundle import Bundle
from ffl_deploy.bundle_files import AUTO
from ffl_deploy.contract import NOT_BOUND
from ffl_deploy.errors import CheckError, OtherMachine, UsageError
from ffl_deploy.files import entries, shown
from ffl_deploy.manifest import MANIFEST, Variant
from ffl_deploy.parity import ParityRecord
from ffl_deploy.runtime.onnx_wire import refuse_external_data
from ffl_deploy.runtime.operators import refuse_foreign_operators
from ffl_deploy.saturation import check_certificate
from ffl_deploy.selfcheck import check_preprocessing, golden_record, reason, refusal


def check_files(bundle: Bundle) -> int:
    """-> number of files checked.

    Raises CheckError for a missing, changed or unlisted file, for external data, and for an int8 file that
    could saturate or does not match its certificate.
    """
    listed = bundle.manifest.files
    for name in listed:
        path = bundle.checked_file(name)
        if name.endswith(".onnx"):
            refuse_external_data(path)
            refuse_foreign_operators(path)
    extra = sorted(set(entries(bundle.folder)) - set(listed) - {MANIFEST})
    if extra:
        raise CheckError(
            f"{shown(bundle.folder)} holds {len(extra)} file(s) that its manifest does not list "
            f"({', '.join(extra[:3])}); remove them, or copy the bundle anew."
        )
    for variant in bundle.manifest.variants:
        if variant.details.certificate:
            check_certificate(bundle.folder / variant.file, variant.details.certificate)
    return len(listed)


def remark(variant: Variant) -> str:
    """-> what to say about an int8 file without a certificate."""
    if (
        variant.precision.stored != "int8"
        or not variant.file.endswith(".onnx")
        or variant.details.certificate
    ):
        return ""
    return ", not proven to hold on other processors (exported before int8 files were)"


def check_parity(
    bundle: Bundle, variant: Variant, runtime: str | None = None, threads: int | None = None
) -> ParityRecord:
    """Run the golden samples at batches 1, 7 and all; -> metrics and verdict against PyTorch's logits.

    Raises UsageError where the runtime is unknown or not installed,
    CheckError where the model cannot be loaded or run.
    """
    session = bundle.open(variant.name, runtime, threads)
    record = golden_record(bundle, variant, session)
    session.close()
    return record


def verify(bundle: Bundle, variant: str | None = None, runtime: str | None = None) -> Iterator[str]:
    """Verify a bundle, yielding one line per check. Without `variant`,
    every variant that this machine can run.

    With "auto" every one is run and timed too, and the fastest that holds is verified.

    Raises CheckError at the first check that does not hold, UsageError where nothing could be run.
    """
    count = check_files(bundle)
    prepared = ", pictures decoded and resized as in training" if check_preprocessing(bundle) else ""
    yield (
        f"{shown(bundle.folder)}: schema {bundle.manifest.schema}, target {bundle.manifest.target}, {count} "
        f"files as exported{prepared}{'' if bundle.bound else f'; {NOT_BOUND}'}"
    )
    if variant == AUTO:
        choice = bundle.fastest(runtime, remembered=False)
        variant, runtime = choice.variant, choice.runtime
        yield f"auto: {choice.why}"
    verified, missing = 0, ""
    for candidate in [bundle.variant(variant)] if variant else bundle.manifest.variants:
        name = runtime or candidate.runtime
        try:
            record = check_parity(bundle, candidate, name)
        except (UsageError, OtherMachine) as error:
            if variant or runtime:
                raise
            missing = str(error)
            yield f"{candidate.name}: not run: {missing}"
            continue
        if record.verdict.failed:
            raise refusal(bundle, candidate, name, reason(record))
        verified += 1
        yield f"{candidate.name} on {name}: {summary(record)}{remark(candidate)}"
    if not verified:
        raise UsageError(missing)


def summary(record: ParityRecord) -> str:
    """-> one line for people: the largest difference, agreement, the gate that held."""
    worst = record.worst
    agreement = 1 - max(metrics.top1_mismatches / metrics.n for metrics in record.batches.values())
    return (
        f"{max(metrics.n for metrics in record.batches.values())} images at batches "
        f"{', '.join(record.batches)}: "
        f"max logit difference {worst.scaled_max_diff:.1e} of their standard deviation, "
        f"top-1 agreement {np.floor(agreement * 1000) / 10:g} %, {record.gate.precision} gate "
        f"{record.verdict.status}"
    )
