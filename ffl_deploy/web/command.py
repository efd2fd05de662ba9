"""`ffl-web BUNDLE... --out DIR`: a folder of static files that classifies in the visitor's own browser."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ffl_deploy.command import Parser, run_command
from ffl_deploy.errors import DONE


def parser() -> Parser:
    parser = Parser(
        prog="ffl-web",
        description=(
            "Write bundles as a static web page: pictures are classified in the browser and stay there."
        ),
        epilog=(
            "Any web server can serve the folder; to look at it here: python -m http.server --directory DIR. "
            "Exit code 1: a file of a bundle or of the runtime is not what it should be. "
            "2: the bundles or flags cannot be used."
        ),
        examples=(
            "ffl-web bundles/quickstart/fused --out page",
            "ffl-web small=bundles/quickstart/branch0 bundles/quickstart/fused --out page --webgpu",
        ),
    )
    parser.add_argument(
        "bundles", metavar="[NAME=]BUNDLE", nargs="+", help="what ffl-export wrote; shown side by side"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new folder, or a page to write again"
    )
    parser.add_argument(
        "--variant",
        action="append",
        metavar="NAME",
        help="which file of each bundle (default: fp32); may be repeated",
    )
    parser.add_argument(
        "--examples",
        action="append",
        type=Path,
        default=[],
        metavar="PATH",
        help="pictures, or a folder of them, to try",
    )
    parser.add_argument(
        "--webgpu", action="store_true", help="a larger runtime; offers WebGPU where that keeps the gates"
    )
    parser.add_argument(
        "--runtime-folder",
        type=Path,
        metavar="DIR",
        help="onnxruntime-web, instead of downloading it with npm",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    from ffl_deploy.web.build import WebOptions, web_models, write_web

    models = web_models(arguments.bundles, arguments.variant or [None])
    options = WebOptions(arguments.runtime_folder, arguments.webgpu, tuple(arguments.examples))
    size = write_web(models, arguments.out, options)
    shown = ", ".join(f"{model.name} ({model.variant.name})" for model in models)
    print(f"{arguments.out}: a page of {size / 1e6:.1f} MB with {shown}", flush=True)
    print(f"to look at it: python -m http.server --directory {arguments.out}", flush=True)
    return DONE


def entry() -> None:
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
