"""One application of server and demo: the demo at /, labels of photographs at /classify,
the inference protocol at /v2 and metrics at /metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from serve.demo.guard import DemoGuard, largest_demo_body
from serve.demo.slot import DemoSlot
from serve.server import classify, v2
from serve.server.compression import Compress, Inflate
from serve.server.full_disk import full_disk
from serve.server.limits import Bodies, HostAndOrigin, Token, own_hosts
from serve.server.memory import give_back, trimmer
from serve.server.protocol import HEADER_LENGTH
from serve.server.proxies import Forwarded
from serve.server.repository import Repository
from serve.server.responses import json_response
from serve.server.service import Phase, Service
from serve.server.settings import Settings
from serve.server.tracking import Tracking


def create_app(settings: Settings, stop: Callable[[], None] = lambda: None) -> Starlette:
    """-> the application; it starts to load its bundles when its lifespan starts, and answers health at once.

    Args: stop: called when loading failed; `app.state.service.failure` then says why.
    """
    service = Service(settings, stop)
    repository = Repository(service)
    slot = DemoSlot(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with _running(service, repository, slot, stop):
            yield

    # errors, in the form of the inference protocol
    async def refused(request: Request, error: HTTPException) -> Response:
        return json_response({"error": str(error.detail)}, error.status_code, error.headers)

    async def failed_disk(request: Request, error: OSError) -> Response:
        if (said := full_disk(error)) is None:
            raise error
        return json_response({"error": str(said)}, said.status)

    async def failed(request: Request, error: Exception) -> Response:
        return json_response({"error": "the server failed on this request; its log says why"}, 500)

    errors: dict[Any, Any] = {HTTPException: refused, OSError: failed_disk, Exception: failed}

    # routes: whatever is neither metrics nor protocol belongs to the demo
    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    routes = [
        Mount("/v2", Compress(v2.routes(service, repository))),
        Route("/v2", v2.Descriptions(service, repository).server),
        Route("/metrics", metrics),
        *([Route(classify.PATH, classify.Classify(service))] if settings.protocol else []),
        Mount("/", DemoGuard(slot, service)),
    ]
    # not a FastAPI, which would add nothing but layers that every request passes
    app = Starlette(routes=routes, exception_handlers=errors, lifespan=lifespan)
    app.state.service, app.state.repository = service, repository

    # what every request passes; the last one added is the outermost
    def largest_body(path: str) -> int:
        return (
            settings.limits.body_bytes
            if path.startswith("/v2/") or path == classify.PATH
            else largest_demo_body(path, settings.limits)
        )

    app.add_middleware(Bodies, limits=settings.limits, limit_of=largest_body, room=service.room)
    app.add_middleware(Inflate, prefix="/v2/")
    if settings.token:
        app.add_middleware(Token, token=settings.token)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[HEADER_LENGTH, "x-request-id"],
        )
    app.add_middleware(
        HostAndOrigin,
        hosts=own_hosts(settings.host, settings.allowed_hosts),
        origins=settings.allowed_origins,
    )
    app.add_middleware(Tracking, service=service)
    app.add_middleware(Forwarded, root_path=settings.root_path, proxies=settings.trusted_proxies)
    return app


@contextlib.asynccontextmanager
async def _running(
    service: Service, repository: Repository, slot: DemoSlot, stop: Callable[[], None]
) -> AsyncIterator[None]:
    """Load in the background for as long as the server runs;
    the demo's own lifespan stays inside one task."""
    ending = asyncio.Event()

    async def live() -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                if service.settings.grpc_port is not None:
                    from serve.server.rpc.port import grpc_port  # an extra

                    await stack.enter_async_context(grpc_port(service, repository))
                await service.load_models()
                if service.settings.demo:
                    await stack.enter_async_context(slot.filled())
                service.become(Phase.READY)
                service.log_ready()
                giving = asyncio.create_task(give_back(trimmer()))
                stack.callback(giving.cancel)
                if service.settings.watch_seconds is not None:
                    watching = asyncio.create_task(repository.watch(service.settings.watch_seconds))
                    stack.callback(watching.cancel)
            except Exception as error:
                service.failure = error
                stop()
            await ending.wait()

    task = asyncio.create_task(live())
    if service.settings.demo:
        slot.preload()  # while the bundles are being verified
    try:
        yield
    finally:
        ending.set()
        await task
        await asyncio.to_thread(service.close)
