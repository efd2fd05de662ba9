"""`ffl-serve BUNDLE...`: one FastAPI application with the demo at /, the inference protocol at /v2 and metrics at /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ffl_deploy.command import Parser, positive, run_command
from ffl_deploy.errors import DONE, UsageError
from ffl_deploy.runtime import RUNTIMES
from serve.demo import in_gradio_thread
from serve.settings import Limits, ModelSpec, Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serve.service import Service

NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def create_app(settings: Settings, stop: Callable[[], None] = lambda: None) -> FastAPI:
    """-> the application; it starts to load its bundles when its lifespan starts, and answers health at once.

    Args: stop: called when loading failed; `app.state.service.failure` then says why.
    """
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.responses import JSONResponse

    from serve import v2
    from serve.demo.guard import DemoGuard, body_limits
    from serve.limits import LOOPBACK, Bodies, HostAndOrigin, Token
    from serve.service import Service
    from serve.tracking import Tracking

    service = Service(settings)
    slot = DemoSlot(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _running(service, slot, stop):
            yield

    # No generated API pages: they load scripts from elsewhere, and the protocol has its own specification.
    app = FastAPI(title="ffl-serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service

    @app.exception_handler(HTTPException)
    @app.exception_handler(404)
    @app.exception_handler(405)
    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "the server failed on this request; its log says why"}, 500)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    app.add_route("/metrics", metrics)
    app.add_route("/v2", v2.Descriptions(service).server)
    app.mount("/v2", v2.routes(service))
    app.mount("/", slot)

    # The last one added is the outermost.
    app.add_middleware(DemoGuard, service=service)
    app.add_middleware(Bodies, limits=settings.limits, limit_of=body_limits(settings.limits))
    if settings.token:
        app.add_middleware(Token, token=settings.token)
    local = settings.host in LOOPBACK
    app.add_middleware(HostAndOrigin, hosts=(*LOOPBACK, *settings.allowed_hosts) if local else settings.allowed_hosts)
    app.add_middleware(Tracking, service=service)
    return app


class DemoSlot:
    """Where the demo appears once it is built. Importing Gradio takes seconds, and health has to answer meanwhile."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.app: FastAPI | None = None

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        from serve.asgi import send_json

        if self.app is not None:
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        if self.service.settings.demo:
            return await send_json(send, 503, {"error": "the demo is still loading; try again"}, {"retry-after": "2"})
        if scope["path"] == "/":
            return await send_json(send, 200, {"name": "ffl-serve", "protocol": "/v2", "metrics": "/metrics"})
        return await send_json(send, 404, {"error": "there is nothing here; the inference protocol is at /v2"})


@contextlib.asynccontextmanager
async def _running(service: Service, slot: DemoSlot, stop: Callable[[], None]) -> AsyncIterator[None]:
    """Load in the background for as long as the server runs; the demo's own lifespan stays inside one task."""
    from serve.service import Phase

    ending = asyncio.Event()

    async def live() -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                await service.load_models()
                if service.settings.demo:
                    slot.app = await stack.enter_async_context(_demo(service))
                service.become(Phase.READY)
                service.log_ready()
            except Exception as error:
                service.failure = error
                stop()
            await ending.wait()

    task = asyncio.create_task(live())
    if service.settings.demo:
        preload = asyncio.create_task(in_gradio_thread(_import_demo))  # while the bundles are being verified
        preload.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        yield
    finally:
        ending.set()
        await task
        await asyncio.to_thread(service.close)


def _import_demo() -> None:
    importlib.import_module("serve.demo.page")  # not a statement: it is wanted for its time only, and linters remove unused names


@contextlib.asynccontextmanager
async def _demo(service: Service) -> AsyncIterator[FastAPI]:
    await in_gradio_thread(_import_demo)
    from serve.demo.page import mounted

    async with mounted(service) as app:
        yield app


def parse_arguments(argv: Sequence[str], program: str = "ffl-serve") -> Settings:
    """-> Settings. Raises UsageError for values that cannot be served."""
    parser = Parser(
        prog=program,
        description="Serve bundles: a demo at /, the Open Inference Protocol v2 at /v2, Prometheus metrics at /metrics.",
        epilog="SIGTERM drains: requests in flight are answered, then the exit code is 0. See docs/serving.md.",
    )
    parser.add_argument(
        "bundles", nargs="+", metavar="[NAME=]BUNDLE", help="a bundle folder, served under its folder's name or as NAME"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="0 takes any free port (default: 7860)")
    parser.add_argument("--variant", help="variant of every bundle, such as int8 (default: fp32)")
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), help="default: the one that the variant was verified with")
    parser.add_argument("--threads", type=positive, help="threads of one run (default: the cores, shared among the workers)")
    parser.add_argument(
        "--workers", type=positive, default=2, help="runs of one model at a time; 1 answers a lone request soonest (default: 2)"
    )
    parser.add_argument("--max-batch", type=positive, default=32, help="images in one run of a model (default: 32)")
    parser.add_argument(
        "--max-queue", type=positive, default=Limits.queued_images, help="images that may wait for one model; more get 503"
    )
    parser.add_argument(
        "--max-body-mib", type=positive, default=Limits.body_bytes >> 20, help="largest /v2 request (default: 32)"
    )
    parser.add_argument(
        "--token-file", type=Path, help="file with a secret: clients send it as bearer token, browsers as password"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a further Host name clients use (repeatable)"
    )
    parser.add_argument(
        "--drain", type=float, default=1.0, metavar="SECONDS", help="from 'not ready' to closing the port (default: 1)"
    )
    parser.add_argument("--shutdown", type=float, default=30.0, metavar="SECONDS", help="for requests in flight (default: 30)")
    parser.add_argument("--access-log", action="store_true", help="log every request, not only refused ones")
    parser.add_argument("--log-format", choices=("json", "text"), help="default: text on a terminal, else json")
    parser.add_argument("--no-demo", action="store_true", help="the protocol alone, without importing Gradio")
    given = parser.parse_args(argv)
    if not 0 <= given.port <= 65535:
        raise UsageError(f"--port is {given.port}; it has to be from 0 to 65535.")
    if given.drain < 0 or given.shutdown < 0:
        raise UsageError("--drain and --shutdown cannot be negative.")
    return Settings(
        models=tuple(model_spec(text, given.variant) for text in given.bundles),
        host=given.host,
        port=given.port,
        demo=not given.no_demo,
        runtime=given.runtime,
        threads=given.threads,
        max_batch=given.max_batch,
        workers=given.workers,
        token=_read_token(given.token_file) if given.token_file else None,
        allowed_hosts=tuple(name.lower() for name in given.allow_host),
        drain_seconds=given.drain,
        shutdown_seconds=given.shutdown,
        access_log=given.access_log,
        log_format=given.log_format or ("text" if sys.stderr.isatty() else "json"),
        limits=Limits(queued_images=given.max_queue, body_bytes=given.max_body_mib << 20),
    )


def model_spec(text: str, variant: str | None = None) -> ModelSpec:
    """`NAME=BUNDLE` or `BUNDLE` -> ModelSpec. A folder that exists is one, even with `=` in its path. Raises UsageError."""
    name, equals, folder = text.partition("=")
    if not equals or Path(text).exists():
        name, folder = Path(text).resolve().name, text
    if not name or not NAME_CHARACTERS.issuperset(name):
        raise UsageError(f"{name!r} cannot be a model's name in a URL; give one of letters, digits and -_. as in cats={folder}")
    return ModelSpec(name, Path(folder), variant)


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        raise UsageError(
            f"{path} holds more than plain text; make a secret of text, for example with: openssl rand -hex 32"
        ) from None
    if len(token) < 16:
        raise UsageError(f"{path} holds {len(token)} characters; use a random secret of at least 16.")
    return token


def main(argv: Sequence[str]) -> int:
    return serve(parse_arguments(argv))


def serve(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; -> exit code. Raises UsageError, CheckError."""
    from serve.offline import private_environment

    with private_environment():
        from serve.lifecycle import run_until_signal
        from serve.models import check_specs

        check_specs(settings.models)
        run_until_signal(settings)
    return DONE


def entry() -> None:
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
