"""`ffl-verify BUNDLE`: bundle_checks for people, a line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ffl_deploy.command import Parser, printable, run_command
from ffl_deploy.errors import DONE, FflError


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="ffl-verify",
        description="Check bundles: schema, every hash, and the golden samples on this machine's runtime.",
        epilog=(
            "Exit code 1: a check of some bundle did not hold (the others are checked all the same). "
            "2: a bundle or a flag cannot be used."
        ),
        examples=(
            "ffl-verify bundles/quickstart/fused",
            "ffl-verify bundles/quickstart/* --runtime openvino",
        ),
    )
    parser.add_argument(
        "bundles",
        metavar="BUNDLE",
        nargs="+",
        help="a folder that ffl-export wrote (it holds bundle.json)",
    )
    parser.add_argument(
        "--variant", metavar="NAME", help="one variant, or auto: the fastest that holds here (default: all)"
    )
    parser.add_argument(
        "--runtime", metavar="NAME", help="run it on this runtime: onnxruntime, openvino, tensorrt, ..."
    )
    parser.add_argument(
        "--public-key", type=Path, metavar="PEM", help="also check the bundle's signature (BUNDLE.sig)"
    )
    arguments = parser.parse_args(argv)
    # NumPy and the runtimes only now: --help and a mistyped flag are answered without them
    from ffl_deploy.bundle import load_bundle
    from ffl_deploy.bundle_checks import verify
    from ffl_deploy.files import shown
    from ffl_deploy.signing import check_signature

    bundles = [load_bundle(folder) for folder in arguments.bundles]
    code = DONE
    for bundle in bundles:
        try:
            if arguments.public_key:
                check_signature(bundle.folder, arguments.public_key)
                print(f"{shown(bundle.folder)}: signed by the owner of {arguments.public_key}", flush=True)
            for line in verify(bundle, arguments.variant, arguments.runtime):
                print(printable(line), flush=True)
        except FflError as error:
            if len(bundles) == 1:
                raise
            print(f"ffl-verify: error: {printable(str(error))}", file=sys.stderr, flush=True)
            code = code or error.exit_code
    return code


def entry() -> None:
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
