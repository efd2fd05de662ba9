"""Where the demo appears once it is built. Importing Gradio takes seconds,
and health has to answer meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.demo import in_gradio_thread
from serve.server.responses import json_response
from serve.server.service import Service


class DemoSlot:
    """An application: the demo while it is there, before that (and for a server without a demo)
    a sentence."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._demo: ASGIApp | None = None
        self._preload: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._demo is not None:
            return await self._demo(scope, receive, send)
        if scope["type"] != "http":
            return None
        if self.service.settings.demo:
            loading = {"error": "the demo is still loading; try again"}
            response = json_response(loading, 503, {"retry-after": "2"})
        elif scope["path"] == "/":
            response = json_response({"name": "ffl-serve", "protocol": "/v2", "metrics": "/metrics"})
        else:
            response = json_response(
                {"error": "there is nothing here; the inference protocol is at /v2"}, 404
            )
        return await response(scope, receive, send)

    def preload(self) -> None:
        """Start to import the page. Nobody waits for it: `filled` meets the fault of an import that fails."""
        self._preload = asyncio.create_task(in_gradio_thread(_import_page))
        self._preload.add_done_callback(lambda done: done.cancelled() or done.exception())

    @contextlib.asynccontextmanager
    async def filled(self) -> AsyncIterator[None]:
        """Build the demo of the service's models, which have to be loaded,
        and answer with it from inside the block on."""
        await in_gradio_thread(_import_page)
        from serve.demo.page import mounted

        async with mounted(self.service) as demo:
            self._demo = demo
            yield


def _import_page() -> None:
    # not a statement: it is wanted for its time only, and linters remove unused names
    importlib.import_module("serve.demo.page")
