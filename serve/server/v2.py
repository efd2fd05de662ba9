"""The routes under /v2: the Open Inference Protocol over HTTP."""

from __future__ import annotations

import asyncio
import time

import numpy as np
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Receive, Scope, Send

import ffl_deploy
from serve.server.exchange import REFUSALS, ClientGone, read_body, refusal, while_connected
from serve.server.models import ServedModel
from serve.server.protocol import (
    HEADER_LENGTH,
    VERSION,
    InferRequest,
    ProtocolError,
    read_request,
    write_response,
)
from serve.server.responses import json_response
from serve.server.service import Phase, Service

# A JSON body of this size is parsed in about a millisecond; larger ones go to a thread,
# so that they delay nobody.
PARSE_INLINE_BYTES = 64 * 1024


def routes(service: Service) -> Router:
    """-> the router to mount at /v2; of a demo alone it has the health routes only."""
    described = Descriptions(service)
    found: list[BaseRoute] = [Route("/health/live", described.live), Route("/health/ready", described.ready)]
    if service.settings.protocol:
        infer = Infer(service)
        found.append(Route("/models/stats", described.all_statistics))  # before a model of that name
        found += [Route("/", described.server), Route("/repository/index", described.index, methods=["POST"])]
        for model in ("/models/{name}", "/models/{name}/versions/{version}"):
            found += [
                Route(model, described.model),
                Route(model + "/ready", described.model_ready),
                Route(model + "/config", described.config),
                Route(model + "/stats", described.statistics),
                Route(model + "/infer", infer, methods=["POST"]),
            ]
    return Router(found, redirect_slashes=False, default=_not_found)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(
        404,
        "the inference protocol has no such route; it has /v2/models/NAME[/config, /stats], "
        "POST /v2/models/NAME/infer, "
        "/v2/health/ready and POST /v2/repository/index; for labels of a photograph see POST /classify",
    )


def find_model(service: Service, name: str, version: str | None = None) -> ServedModel:
    """-> the model that the path names. Raises HTTPException 404, or 503 while bundles are still loading."""
    if name in service.models and version in (None, VERSION):
        return service.models[name]
    if name in {spec.name for spec in service.settings.models} and version in (None, VERSION):
        raise HTTPException(503, f"{name} is still loading", {"retry-after": "1"})
    raise HTTPException(
        404, f"there is no such model; this server has {', '.join(service.models) or 'none yet'}"
    )


class Descriptions:
    """Everything under /v2 but inference: health, metadata, index."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def server(self, request: Request) -> Response:
        extensions = ["binary_tensor_data", "classification", "model_configuration", "statistics"]
        return json_response(
            {"name": "ffl-serve", "version": ffl_deploy.__version__, "extensions": extensions}
        )

    async def live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        ready = self.service.ready
        return json_response({"ready": ready, "phase": self.service.phase.value}, 200 if ready else 503)

    async def model(self, request: Request) -> Response:
        return json_response(self._model(request).signature.metadata())

    async def model_ready(self, request: Request) -> Response:
        name = self._model(request).name
        draining = self.service.phase in (Phase.DRAINING, Phase.CLOSING)
        return json_response({"name": name, "ready": not draining}, 503 if draining else 200)

    async def config(self, request: Request) -> Response:
        model = self._model(request)
        return json_response(model.signature.config(self.service.settings.max_batch))

    async def statistics(self, request: Request) -> Response:
        model = self._model(request)
        return json_response({"model_stats": [model.statistics.described(model.name, VERSION)]})

    async def all_statistics(self, request: Request) -> Response:
        models = self.service.models.values()
        return json_response(
            {"model_stats": [model.statistics.described(model.name, VERSION) for model in models]}
        )

    async def index(self, request: Request) -> Response:
        states = {spec.name: spec.name in self.service.models for spec in self.service.settings.models}
        return json_response(
            [
                {"name": name, "version": VERSION, "state": "READY" if loaded else "LOADING"}
                for name, loaded in states.items()
            ]
        )

    def _model(self, request: Request) -> ServedModel:
        return find_model(self.service, request.path_params["name"], request.path_params.get("version"))


class Infer:
    """POST /v2/models/NAME/infer, as plain ASGI: it is the one route whose own cost counts."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        model = find_model(self.service, scope["path_params"]["name"], scope["path_params"].get("version"))
        began = time.perf_counter()
        try:
            body = await read_body(receive)
            async with while_connected(receive):
                response = await self._answer(model, body, _header_length(scope))
        except ClientGone:
            return
        except REFUSALS as error:
            response = refusal(error, model.name)
        counted = model.statistics.success if response.status_code < 400 else model.statistics.fail
        counted.add(time.perf_counter() - began)
        await response(scope, receive, send)

    async def _answer(self, model: ServedModel, body: bytes, header_length: int | None) -> Response:
        # what is asked
        began = time.perf_counter()
        json_bytes = len(body) if header_length is None else header_length
        if json_bytes > PARSE_INLINE_BYTES:
            request = await asyncio.to_thread(read_request, body, header_length, model.signature)
        else:
            request = read_request(body, header_length, model.signature)

        images = await self._images(model, request)
        model.statistics.input.add(time.perf_counter() - began)

        # the model, in a batch with whoever asks at the same time
        outputs = await model.infer(images)
        results = {name: values for name, values in outputs._asdict().items() if values is not None}

        began = time.perf_counter()
        # the answer: JSON, with raw tensors behind it if the client wants them
        buffers, length = write_response(model.signature, request, results)
        content = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        model.statistics.output.add(time.perf_counter() - began)
        if length is None:
            return Response(content, media_type="application/json")
        return Response(content, headers={HEADER_LENGTH: str(length)}, media_type="application/octet-stream")

    async def _images(self, model: ServedModel, request: InferRequest) -> np.ndarray:
        if request.images is not None:
            return request.images
        return await self.service.decoders.prepare(request.encoded, model)


MOST_DIGITS = 12  # of a length


def _header_length(scope: Scope) -> int | None:
    text = Headers(scope=scope).get(HEADER_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS):
        raise ProtocolError(f"{HEADER_LENGTH} has to be a whole number")
    return int(text)
