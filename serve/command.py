"""`ffl-serve BUNDLE...`: its flags, and the process that they start."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ffl_deploy.command import Parser, gpu_number, positive, run_command
from ffl_deploy.errors import DONE, UsageError
from ffl_deploy.installed import require
from ffl_deploy.runtime import RUNTIMES
from ffl_deploy.runtime.gpu import use_gpu
from serve.server.settings import Limits, ModelSpec, Settings


def build_parser(demo_alone: bool = False) -> Parser:
    """-> the flags of `ffl-serve`, or of `python -m serve.demo`, which serves the demo and nothing else."""
    parser = Parser(
        prog="python -m serve.demo" if demo_alone else "ffl-serve",
        description=(
            "Serve the demo page of bundles at /, with health checks and metrics; no inference protocol."
            if demo_alone
            else (
                "Serve bundles: a demo at /, pictures to labels at /classify, the Open Inference Protocol v2 "
                "at /v2, Prometheus metrics at /metrics."
            )
        ),
        epilog="SIGTERM drains: requests in flight are answered, then exit code 0. See docs/serving.md.",
        examples=(
            ("python -m serve.demo bundles/quickstart/fused", "python -m serve.demo examples/cifar100/*")
            if demo_alone
            else (
                "ffl-serve bundles/quickstart/fused bundles/quickstart/branch0",
                "ffl-serve digits=bundles/quickstart/fused --port 8000 --variant auto --no-demo",
            )
        ),
    )
    parser.add_argument(
        "bundles",
        nargs="+",
        metavar="[NAME=]BUNDLE",
        help="a bundle folder, served under its folder's name or as NAME",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: this machine only)",
    )
    parser.add_argument(
        "--port", type=int, default=7860, metavar="N", help="0 takes any free port (default: 7860)"
    )
    if not demo_alone:
        parser.add_argument(
            "--grpc-port",
            type=int,
            metavar="N",
            help="the protocol over gRPC too, on this port (default: not)",
        )
    parser.add_argument(
        "--title", metavar="TEXT", help="of the demo's page (default: what the first model was trained on)"
    )
    if not demo_alone:
        parser.add_argument(
            "--no-demo", action="store_true", help="the protocols alone, without importing Gradio"
        )

    computing = parser.add_argument_group("how it is computed")
    computing.add_argument(
        "--variant",
        metavar="NAME",
        help="variant of every bundle, such as int8; auto: the fastest that holds here (default: fp32)",
    )
    computing.add_argument(
        "--runtime",
        choices=sorted(RUNTIMES),
        metavar="NAME",
        help="onnxruntime, openvino, ... (default: the one that the variant was verified with)",
    )
    computing.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="threads of one run (default: the cores, shared among the workers)",
    )
    computing.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="runs of one model at a time; 1 answers a lone request soonest (default: 2; on a GPU 1)",
    )
    computing.add_argument(
        "--gpu",
        type=gpu_number,
        metavar="N",
        help="the GPU to compute on, as nvidia-smi counts, with a --runtime on one (default: 0)",
    )
    computing.add_argument(
        "--max-batch",
        type=positive,
        default=32,
        metavar="N",
        help="images in one run of a model (default: 32)",
    )
    computing.add_argument(
        "--sets",
        metavar="LEVEL",
        help=(
            "give with each answer the set that holds the right class in LEVEL %% of images, and whether to "
            "abstain: 90, 95, 99 or 90-by-class, ... of bundles exported with --sets"
        ),
    )

    bounds = parser.add_argument_group("bounds, and who may come in")
    bounds.add_argument(
        "--max-queue",
        type=positive,
        default=Limits.queued_images,
        metavar="N",
        help="images that may wait for one model; more get 503 (default: %(default)s)",
    )
    bounds.add_argument(
        "--max-body-mib",
        type=positive,
        default=Limits.body_bytes >> 20,
        metavar="MIB",
        help="largest request (default: %(default)s)",
    )
    bounds.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with a secret: clients send it as bearer token, browsers as password",
    )
    bounds.add_argument(
        "--public-key",
        type=Path,
        metavar="PEM",
        help="serve only bundles that the owner of this key has signed (BUNDLE.sig)",
    )
    bounds.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further Host name clients use, * for any; may be repeated (default: this machine's)",
    )

    behind = parser.add_argument_group("behind a proxy, and for pages elsewhere")
    behind.add_argument(
        "--root-path", default="", metavar="/PATH", help="the prefix under which a proxy shows the server"
    )
    behind.add_argument(
        "--trust-proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a proxy or network whose X-Forwarded-For, -Proto and -Host are believed; may be repeated",
    )
    behind.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a page elsewhere that may call /v2 and /classify, as https://shop.example; may be repeated",
    )

    replacing = parser.add_argument_group("bundles that are replaced while it runs")
    replacing.add_argument(
        "--watch",
        type=float,
        metavar="SECONDS",
        help="look this often for a bundle that was replaced on disk; it answers once it is verified",
    )
    replacing.add_argument(
        "--model-control",
        action="store_true",
        help="clients may load and unload models through /v2/repository",
    )

    ending = parser.add_argument_group("its end, and what it logs")
    ending.add_argument(
        "--drain",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="from 'not ready' to closing the port (default: 1)",
    )
    ending.add_argument(
        "--shutdown", type=float, default=30.0, metavar="SECONDS", help="for requests in flight (default: 30)"
    )
    ending.add_argument("--access-log", action="store_true", help="log every request, not only refused ones")
    ending.add_argument(
        "--log-format", choices=("json", "text"), help="default: text on a terminal, else json"
    )
    ending.add_argument(
        "--otlp",
        metavar="URL",
        help="send OpenTelemetry traces to this collector, as http://localhost:4318 (default: none are made)",
    )
    return parser


def parse_arguments(argv: Sequence[str], demo_alone: bool = False) -> Settings:
    """-> Settings. Raises UsageError for values that cannot be served."""
    given = build_parser(demo_alone).parse_args(argv)
    if not 0 <= given.port <= 65535:
        raise UsageError(f"--port is {given.port}; it has to be from 0 to 65535.")
    grpc_port = None if demo_alone else given.grpc_port
    if grpc_port is not None:
        require("grpc", "leave --grpc-port out to serve HTTP alone")
        if not 0 <= grpc_port <= 65535 or (grpc_port and grpc_port == given.port):
            raise UsageError(f"--grpc-port is {grpc_port}; it has to be from 0 to 65535, and not --port.")
    if given.drain < 0 or given.shutdown < 0:
        raise UsageError("--drain and --shutdown cannot be negative.")
    if given.watch is not None and not 0.1 <= given.watch <= 86_400:
        raise UsageError(f"--watch is {given.watch:g}; it has to be from 0.1 to 86400 seconds.")
    if given.otlp is not None:
        require("opentelemetry.exporter.otlp.proto.http", "leave --otlp out")
        parts = urlsplit(given.otlp)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                f"--otlp {given.otlp!r} is no address of a collector; give the one that takes OTLP over "
                "HTTP, such as http://localhost:4318."
            )
    return Settings(
        models=tuple(ModelSpec.parse(text, given.variant) for text in given.bundles),
        host=given.host,
        port=given.port,
        grpc_port=grpc_port,
        demo=demo_alone or not given.no_demo,
        protocol=not demo_alone,
        title=given.title,
        runtime=given.runtime,
        threads=given.threads,
        max_batch=given.max_batch,
        workers=given.workers,
        gpu=given.gpu,
        model_control=given.model_control,
        watch_seconds=given.watch,
        sets=given.sets,
        token=_read_token(given.token_file) if given.token_file else None,
        token_file=given.token_file,
        public_key=given.public_key,
        allowed_hosts=tuple(name.lower() for name in given.allow_host),
        allowed_origins=tuple(_origin(text) for text in given.allow_origin),
        root_path=_root_path(given.root_path),
        trusted_proxies=tuple(_proxy(text) for text in given.trust_proxy),
        drain_seconds=given.drain,
        shutdown_seconds=given.shutdown,
        access_log=given.access_log,
        otlp=given.otlp,
        log_format=given.log_format or ("text" if sys.stderr.isatty() else "json"),
        limits=Limits(queued_images=given.max_queue, body_bytes=given.max_body_mib << 20),
    )


def _root_path(text: str) -> str:
    """-> the prefix `/app` of what --root-path says; "" for none. Raises UsageError."""
    path = "/" + text.strip("/") if text.strip("/") else ""
    if not path.isascii() or any(character in path for character in "?#%\\ \"'<>") or "//" in path:
        raise UsageError(f"--root-path {text!r} is no path; give for example /app.")
    return path


def _proxy(text: str) -> str:
    """-> an address, a network, or * for all, as --trust-proxy says it. Raises UsageError."""
    if text != "*":
        try:
            ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise UsageError(
                f"--trust-proxy {text!r} is no address; give the proxy's, such as 127.0.0.1 or 10.0.0.0/8."
            ) from None
    return text


def _origin(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query:
        raise UsageError(
            f"--allow-origin {text!r} is no origin; give scheme and name, as in https://shop.example."
        )
    return f"{parts.scheme}://{parts.netloc}".lower()


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UsageError(
            f"--token-file {path} cannot be read ({(error.strerror or str(error)).lower()}); "
            "give a file that holds a secret."
        ) from None
    except UnicodeDecodeError:
        raise UsageError(
            f"{path} holds more than plain text; make a secret of text, for example with: openssl rand -hex "
            "32"
        ) from None
    if len(token) < 16:
        raise UsageError(f"{path} holds {len(token)} characters; use a random secret of at least 16.")
    return token


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; -> exit code. Raises UsageError, CheckError."""
    if settings.gpu is not None:
        use_gpu(settings.gpu)
    from serve.app import create_app  # Starlette and uvicorn take a second, which --help does without
    from serve.lifecycle import serve

    serve(settings, create_app)
    return DONE


def main(argv: Sequence[str]) -> int:
    return run(parse_arguments(argv))


def entry() -> None:
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
