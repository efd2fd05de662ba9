"""One FastAPI application with the demo at /, the inference protocol at /v2 and metrics at /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from serve.demo import in_gradio_thread
from serve.server.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serve.server.service import Service


def create_app(settings: Settings, stop: Callable[[], None] = lambda: None) -> FastAPI:
    """-> the application; it starts to load its bundles when its lifespan starts, and answers health at once.

    Args: stop: called when loading failed; `app.state.service.failure` then says why.
    """
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.responses import JSONResponse

    from serve.demo.guard import DemoGuard, body_limits
    from serve.server import v2
    from serve.server.limits import LOOPBACK, Bodies, HostAndOrigin, Token
    from serve.server.service import Service
    from serve.server.tracking import Tracking

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
        from serve.server.asgi import send_json

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
    from serve.server.service import Phase

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
