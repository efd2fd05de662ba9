"""A bundle's gates on other processors, by emulation, and a record of it in the bundle.

    python -m benchmarks.processors examples/cifar100/fused --record

qemu-user runs this very environment as another CPU: Haswell has AVX2 and no VNNI, Nehalem SSE4.2. Every
variant that ONNX Runtime or OpenVINO can run is held to its gate on the golden samples, here and there;
--record writes the outcomes into the manifest and the card. Exit 1 where a gate does not hold.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from export.computed import computed_precision
from export.publish.card import model_card
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.bundle_checks import check_files
from ffl_deploy.command import Parser, run_command
from ffl_deploy.errors import CHECK_FAILED, DONE, CheckError, OtherMachine, UsageError
from ffl_deploy.files import shown, write_atomically
from ffl_deploy.manifest import Variant, file_records, write_manifest
from ffl_deploy.processor import description
from ffl_deploy.runtime import open_session
from ffl_deploy.selfcheck import golden_record
from ffl_deploy.signing import signature_path
from ffl_deploy.verified_on import Outcome, VerifiedOn, processor_table, with_record

EMULATOR = "qemu-x86_64"
OWN_KERNELS = ("-U", "OPENBLAS_CORETYPE")  # what this machine's NumPy is told is not for the other CPU
PROCESSORS = ("Haswell", "Nehalem")
RUNTIMES = ("onnxruntime", "openvino")


def outcomes(bundle: Bundle, emulated: str | None = None) -> VerifiedOn:
    """-> the gates of every variant that this processor can run. Raises UsageError where it can run none."""
    found = {}
    for variant in bundle.manifest.variants:
        if variant.runtime in RUNTIMES:
            try:
                found[variant.name] = outcome(bundle, variant)
            except (UsageError, OtherMachine):  # a runtime that is not installed here
                continue
    if not found:
        raise UsageError(f"{shown(bundle.folder)} has no variant that this machine can run.")
    return VerifiedOn(description(), emulated, found)


def outcome(bundle: Bundle, variant: Variant) -> Outcome:
    session = open_session(bundle, variant)
    record = golden_record(bundle, variant, session)
    # As export reads it back: from ONNX Runtime's optimised graph; OpenVINO tells by itself,
    # or computes what is stored.
    on_onnxruntime = session.runtime == "onnxruntime"
    computed = (
        computed_precision(bundle.checked_file(variant.file))[0] if on_onnxruntime else session.computed
    )
    return Outcome.of(record, session.runtime, session.version, computed or variant.precision.stored)


def emulated_outcomes(folder: Path, processor: str) -> VerifiedOn:
    """-> `outcomes` of the bundle on an emulated processor. Raises UsageError without an emulator,
    CheckError where it fails."""
    if shutil.which(EMULATOR) is None:
        raise UsageError(
            f"{EMULATOR} is not installed; run: apt-get install qemu-user (or give --processor native)."
        )
    command = [
        EMULATOR,
        *OWN_KERNELS,
        "-cpu",
        processor,
        sys.executable,
        "-m",
        __spec__.name,
        "--inside",
        f"{EMULATOR} -cpu {processor}",
    ]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    # features it lacks
    said = [line for line in done.stderr.splitlines() if not line.startswith(f"{EMULATOR}: warning")]
    if done.returncode or not lines:
        raise CheckError(f"{shown(folder)} could not be verified on {processor}: {' '.join(said[-1:])}")
    return msgspec.json.decode(lines[-1], type=VerifiedOn)


def record_in(bundle: Bundle, records: Sequence[VerifiedOn]) -> None:
    """Write `records` into the manifest and the card.
    Raises UsageError where that would break a signature."""
    if signature_path(bundle.folder).exists():
        raise UsageError(
            f"{shown(bundle.folder)} is signed; record first, then sign it again (remove its .sig file)."
        )
    kept = bundle.manifest.verified_on or []
    for record in records:
        kept = with_record(kept, record)
    manifest = msgspec.structs.replace(bundle.manifest, verified_on=kept)
    write_atomically(bundle.folder / "README.md", model_card(manifest))
    write_manifest(bundle.folder, msgspec.structs.replace(manifest, files=file_records(bundle.folder)))


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.processors", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="folders that ffl-export wrote")
    parser.add_argument(
        "--processor",
        action="append",
        metavar="NAME",
        help=f"native, or a CPU of qemu (default: native, {', '.join(PROCESSORS)})",
    )
    parser.add_argument("--record", action="store_true", help="write the outcomes into manifest and card")
    parser.add_argument(
        "--inside",
        metavar="EMULATOR",
        help="used by the command itself: print this processor's outcomes as JSON",
    )
    arguments = parser.parse_args(argv)
    if arguments.inside:
        print(
            msgspec.json.encode(outcomes(load_bundle(arguments.bundles[0]), arguments.inside)).decode(),
            flush=True,
        )
        return DONE
    failed = False
    for folder in arguments.bundles:
        bundle = load_bundle(folder)
        check_files(bundle)  # a record must not bless what was changed
        records = [
            outcomes(bundle) if name == "native" else emulated_outcomes(bundle.folder, name)
            for name in arguments.processor or ("native", *PROCESSORS)
        ]
        print(f"{shown(bundle.folder)}\n\n{processor_table(records)}\n", flush=True)
        failed |= any(one.gate == "failed" for record in records for one in record.variants.values())
        if arguments.record:
            record_in(bundle, records)
    return CHECK_FAILED if failed else DONE


if __name__ == "__main__":
    sys.exit(run_command(main))
