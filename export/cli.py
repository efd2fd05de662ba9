"""`ffl-export [RUN] --target NAME ...`: a trained run -> verified bundles."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.outputs import FURTHER_OUTPUTS
from ffl_deploy.command import Parser, run_command
from ffl_deploy.errors import DONE, UsageError
from ffl_deploy.host import keep_freed_memory
from ffl_deploy.parity import PRECISIONS
from ffl_deploy.runtime import RUNTIMES

if TYPE_CHECKING:
    from export.cascade import Promise
    from export.pipeline import ExportOptions
    from ffl_deploy.bundle import Bundle
    from ffl_deploy.report import ArtefactLimits, Refusal
    from ffl_deploy.run_directory import Run
    from ffl_deploy.runtime.tensorrt_build import EngineOptions


def parser() -> Parser:
    """-> the command line; defaults that need the run or torch are resolved in `main`."""
    parser = Parser(
        prog="ffl-export",
        description=(
            "Export targets of a trained run as ONNX bundles whose logits are those of training's own "
            "evaluation."
        ),
        epilog=(
            "Exit code 1: a gate did not hold; what passed is written, and what did not is named and is in "
            "no bundle; or no artefact keeps the limits. 2: the run or the flags cannot be used."
        ),
        examples=(
            "ffl-export runs/quickstart --target fused --target branch0",
            "ffl-export runs/quickstart --target all --precision int8",
        ),
    )
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="the run directory (default: the newest under runs/)"
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help=(
            "fused, ensemble, branch0, ..., all of these, or cascade (branch0+fused); may be repeated "
            "(default: the classifier that the run's best checkpoint was chosen by)"
        ),
    )
    parser.add_argument("--checkpoint", default="best", metavar="NAME", help="best (default), last or ema")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="receives one folder per target (default: bundles/RUN)"
    )

    variants = parser.add_argument_group("which files are written, and on what they are verified")
    variants.add_argument(
        "--precision",
        action="append",
        choices=PRECISIONS,
        help="further variants beside fp32; may be repeated",
    )
    variants.add_argument(
        "--runtime",
        action="append",
        choices=[
            name for name, runtime in RUNTIMES.items() if ".onnx" in runtime.reads and not runtime.compiles
        ],
        help="verify and measure every ONNX variant here too; may be repeated",
    )
    variants.add_argument(
        "--tensorrt", action="store_true", help="build TensorRT engines from the suitable variants"
    )
    variants.add_argument(
        "--compute-capability",
        action="append",
        metavar="X.Y",
        help="GPUs to build engines for, for example 8.9; may be repeated",
    )
    variants.add_argument(
        "--golden", type=Path, metavar="DIR", help="take the golden images from here, not from the run's data"
    )

    parser.add_argument(
        "--data",
        metavar="DIR",
        help="where the run's data are now, if they moved; their files have to be those that it read",
    )
    parser.add_argument(
        "--reference-only",
        action="store_true",
        help="judge by the images that training stored alone, without the run's data; the bundle says so",
    )

    graph = parser.add_argument_group("the graph")
    graph.add_argument("--opset", type=int, metavar="N", help="ONNX opset")
    graph.add_argument(
        "--batch", default="dynamic", metavar="dynamic|N", help="batch size of the graph (default: dynamic)"
    )
    for output in FURTHER_OUTPUTS.values():
        graph.add_argument(f"--{output.name}", action="store_true", help=f"further output: {output.help}")

    promises = parser.add_argument_group("answers with a promise")
    promises.add_argument(
        "--sets",
        action="store_true",
        help=(
            "calibrate, for each variant, sets that hold the right class of 90, 95 or 99 %% of images, and "
            "when to abstain, on the run's --calibration-split (else its validation images)"
        ),
    )
    promises.add_argument(
        "--max-loss-points",
        type=float,
        metavar="X",
        help=(
            "of --target cascade: points of accuracy that answering by the first exit may cost, shown on the "
            "same images (default: 0.5, unless --max-deferred is given)"
        ),
    )
    promises.add_argument(
        "--max-deferred",
        type=float,
        metavar="SHARE",
        help="of --target cascade: share of images that the last exit may have to answer (0 to 1)",
    )

    forms = parser.add_argument_group("other forms of the bundles")
    forms.add_argument(
        "--sign",
        type=Path,
        metavar="PEM",
        help="sign each bundle with this private key (TARGET.sig beside it)",
    )
    forms.add_argument(
        "--triton", type=Path, metavar="DIR", help="add the bundles to a Triton model repository"
    )
    forms.add_argument(
        "--name",
        metavar="NAME",
        help="what the models are called there (default: as their targets; of several targets NAME-TARGET)",
    )
    forms.add_argument(
        "--web", type=Path, metavar="DIR", help="write a static page that classifies in the visitor's browser"
    )
    forms.add_argument(
        "--web-variant",
        action="append",
        metavar="NAME",
        help="which files that page has (default: fp32); may be repeated",
    )
    forms.add_argument(
        "--space", type=Path, metavar="DIR", help="write a Hugging Face Space with the bundles"
    )
    forms.add_argument(
        "--space-sdk",
        choices=("static", "gradio"),
        default="static",
        help="the Space is that page (default), or the demo",
    )
    forms.add_argument(
        "--runtime-folder",
        type=Path,
        metavar="DIR",
        help="onnxruntime-web for the page, instead of downloading it with npm",
    )

    report = parser.add_argument_group("the report that recommends one (with --target all, or any of these)")
    report.add_argument(
        "--max-latency-ms", type=float, metavar="X", help="recommend nothing slower (p50, one image)"
    )
    report.add_argument(
        "--min-accuracy", type=float, metavar="X", help="recommend nothing less accurate (0 to 1)"
    )
    report.add_argument("--max-bytes", type=int, metavar="N", help="recommend no larger file")
    report.add_argument(
        "--report-only",
        action="store_true",
        help="write the report over the bundles in --out; export nothing",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    # what was asked for, and whether it can be done
    arguments = parser().parse_args(argv)
    batch = _batch(arguments.batch)
    limits = _limits(arguments)
    if arguments.report_only and arguments.out:
        return _report(arguments.out, limits)

    from ffl_deploy.run_directory import load_run, newest_run

    run = load_run(arguments.run or newest_run())
    if arguments.data:
        run = run.with_data(arguments.data)
    if arguments.name and not arguments.triton:
        raise UsageError("--name is what models are called in a Triton repository; add --triton DIR.")
    out = arguments.out or Path("bundles") / run.name
    if arguments.report_only:
        return _report(out, limits)
    options = _options(arguments, run, out, batch)
    _require_places(arguments, options.targets, run)
    _require_shown(arguments.web_variant or [], options.variants.precisions)

    # the bundles
    from export.pipeline import export_run

    keep_freed_memory()  # PyTorch passes over whole splits
    from export.progress import Progress

    progress = Progress()
    try:
        exported = export_run(run, options, progress)
    finally:
        progress.close()

    # what is made of them, and what was refused
    if exported.bundles:
        _publish(exported.bundles, arguments)
    limited = any(
        value is not None for value in (limits.max_latency_ms, limits.min_accuracy, limits.max_bytes)
    )
    if exported.bundles and (limited or "all" in options.targets):
        _report(out, limits, exported.refused, timed=True)
    exported.require(out)
    return DONE


def _options(arguments: argparse.Namespace, run: Run, out: Path, batch: int | None) -> ExportOptions:
    """-> what to export. Raises UsageError for flags that do not go together."""
    from export.pipeline import ExportOptions
    from export.variants import VariantOptions
    from export.write.onnx_graph import OPSET, OPSETS, GraphOptions
    from ffl_deploy.networks.targets import exits_of

    opset = OPSET if arguments.opset is None else arguments.opset
    if opset not in OPSETS:
        raise UsageError(
            f"--opset {opset} is not supported; choose {OPSETS.start} to {OPSETS.stop - 1} ({OPSET} by "
            "default)."
        )
    options = ExportOptions(
        targets=tuple(arguments.target or [run.model.strong]),
        out=out,
        variants=VariantOptions(
            precisions=tuple(dict.fromkeys(["fp32", *(arguments.precision or [])])),
            runtimes=tuple(dict.fromkeys(["onnxruntime", *(arguments.runtime or [])])),
            graph=GraphOptions(opset, batch),
            engines=_engines(arguments.tensorrt, arguments.compute_capability),
        ),
        checkpoint=arguments.checkpoint,
        extras=tuple(name for name in FURTHER_OUTPUTS if getattr(arguments, name)),
        golden=arguments.golden,
        reference_only=arguments.reference_only,
        sets=arguments.sets,
        promise=_promise(arguments.max_loss_points, arguments.max_deferred),
    )
    if options.reference_only and options.sets:
        raise UsageError(
            "--reference-only exports without the run's data, and --sets is calibrated on them; leave one of "
            "the two out."
        )
    limits = {"loss-points": arguments.max_loss_points, "deferred": arguments.max_deferred}
    if not any(map(exits_of, options.targets)):
        for name in (name for name, value in limits.items() if value is not None):
            raise UsageError(f"--max-{name} is about a cascade; add --target cascade, or leave it out.")
    fitted = [name for name in options.extras if FURTHER_OUTPUTS[name].fit]
    if options.reference_only and fitted:
        raise UsageError(
            f"--reference-only exports without the run's data, and --{fitted[0]} is fitted to them; leave "
            "one of the two out."
        )
    if options.reference_only and (arguments.data or "int8" in options.variants.precisions):
        raise UsageError(
            "--reference-only exports without the run's data: --data names them, and int8 is calibrated on "
            "them; leave one of the two out."
        )
    return options


def _promise(loss: float | None, deferred: float | None) -> Promise:
    """-> what --max-loss-points and --max-deferred ask of a cascade. Raises UsageError."""
    from export.cascade import MAX_LOSS_POINTS, Promise

    if loss is not None and not 0 < loss < 100:
        raise UsageError(f"--max-loss-points {loss:g} has to be above 0 and below 100, as 0.5 is.")
    if deferred is not None and not 0 < deferred < 1:
        raise UsageError(f"--max-deferred {deferred:g} is no share; give for example 0.3 for 30 %.")
    return Promise(MAX_LOSS_POINTS if loss is None and deferred is None else loss, deferred)


def _require_places(arguments: argparse.Namespace, targets: Sequence[str], run: Run) -> None:
    """Raises UsageError, before any work, for a key that cannot sign,
    and a --space or --triton that would overwrite what is not ours."""
    if arguments.sign:
        from ffl_deploy.signing import signer

        signer(arguments.sign)
    if arguments.space:
        from export.publish.space import require_space

        require_space(arguments.space)
    if arguments.web:
        from ffl_deploy.web.build import require_web

        require_web(arguments.web, "--web")
    if arguments.web or (arguments.space and arguments.space_sdk == "static"):
        from ffl_deploy.web.runtime import require_runtime

        require_runtime(arguments.runtime_folder)
    if arguments.triton:
        from export.publish.triton import model_names, require_own_models

        require_own_models(arguments.triton, [*model_names(targets, arguments.name).values()], run.name)


def _require_shown(variants: Sequence[str], exported: Sequence[str]) -> None:
    """Raises UsageError for a --web-variant that this export does not write."""
    for variant in variants:
        if variant not in exported:
            raise UsageError(
                f"--web-variant {variant} is not among what is exported here ({', '.join(exported)}); add "
                "--precision."
            )


def _publish(bundles: Sequence[Bundle], arguments: argparse.Namespace) -> None:
    """Sign the verified bundles, and write them in the other forms that were asked for."""
    key, triton, web, space = arguments.sign, arguments.triton, arguments.web, arguments.space
    shown = arguments.web_variant or [None]
    if key:
        from ffl_deploy.signing import sign_bundle

        for bundle in bundles:
            print(f"{sign_bundle(bundle.folder, key)}: signature of {bundle.folder}", flush=True)
    if triton:
        from export.publish.triton import backend_of, model_names, write_repository

        names = model_names([bundle.manifest.target for bundle in bundles], arguments.name)
        models = [
            model for one in bundles for model in write_repository(one, triton, names[one.manifest.target])
        ]
        print(f"{triton}: Triton models {', '.join(model.name for model in models)}", flush=True)
        skipped = [
            f"{one.name}/{variant.name}"
            for one in bundles
            for variant in one.manifest.variants
            if not backend_of(variant)
        ]
        if skipped:
            print(f"{triton}: without {', '.join(skipped)}, which Triton has no backend for", flush=True)
    if web:
        from ffl_deploy.web.build import WebOptions, web_models, write_web

        write_web(
            web_models([str(bundle.folder) for bundle in bundles], shown),
            web,
            WebOptions(arguments.runtime_folder),
            "--web",
        )
        print(f"{web}: a web page; to look at it: python -m http.server --directory {web}", flush=True)
    if space:
        from export.publish.space import write_space
        from ffl_deploy.web.build import WebOptions

        write_space(bundles, space, arguments.space_sdk, WebOptions(arguments.runtime_folder), shown)
        static = arguments.space_sdk == "static"
        start = f"python -m http.server --directory {space}" if static else f"python {space / 'app.py'}"
        print(f"{space}: a Hugging Face Space; start it here with: {start}", flush=True)


def _limits(arguments: argparse.Namespace) -> ArtefactLimits:
    """-> what --max-latency-ms, --min-accuracy and --max-bytes ask for.
    Raises UsageError for impossible values."""
    from ffl_deploy.report import ArtefactLimits

    if arguments.min_accuracy is not None and not 0 <= arguments.min_accuracy <= 1:
        raise UsageError(
            f"--min-accuracy {arguments.min_accuracy:g} is not a share; give for example 0.95 for 95 %."
        )
    for flag in ("max_latency_ms", "max_bytes"):
        value = getattr(arguments, flag)
        if value is not None and value <= 0:
            raise UsageError(
                f"--{flag.replace('_', '-')} {value:g} leaves nothing to recommend; give a positive number."
            )
    return ArtefactLimits(arguments.max_latency_ms, arguments.min_accuracy, arguments.max_bytes)


def _report(
    folder: Path, limits: ArtefactLimits, refused: Sequence[Refusal] | None = None, timed: bool = False
) -> int:
    """Write the report over the bundles in `folder` and print its recommendation; -> exit code.

    timed: time its files side by side, also where the report before this one has.
    """
    from export.publish.report import bundles_in, known_timings, require, write_report
    from export.publish.side_by_side import time_bundles

    bundles = bundles_in(folder)
    timings = time_bundles(bundles) if timed or not known_timings(folder, bundles) else None
    report = write_report(folder, limits, refused, timings)
    require(report)
    print(f"{folder / 'report.md'}: {report.recommendation.reason}", flush=True)
    return DONE


def _batch(text: str) -> int | None:
    """ "dynamic" -> None, "8" -> 8. Raises UsageError."""
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"--batch {text} is neither dynamic nor a number of images; give for example --batch 8."
        )
    return int(text)


def _engines(wanted: bool, capabilities: list[str] | None) -> EngineOptions | None:
    """-> what --tensorrt and --compute-capability ask for. Raises UsageError."""
    from ffl_deploy.runtime.tensorrt_build import EngineOptions
    from ffl_deploy.runtime.tensorrt_modules import installed_flavour

    if not wanted:
        if capabilities:
            raise UsageError(
                "--compute-capability is about TensorRT engines; add --tensorrt, or leave it out."
            )
        return None
    return EngineOptions(installed_flavour(), tuple(capabilities) if capabilities else None)


def entry() -> None:
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
