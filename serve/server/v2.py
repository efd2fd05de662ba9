"""The routes under /v2: the Open Inference Protocol over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Receive, Scope, Send

import ffl_deploy
from ffl_deploy.errors import FflError, UsageError
from serve.server import noted
from serve.server.exchange import REFUSALS, ClientGone, WhileConnected, read_body, refusal
from serve.server.headers import header
from serve.server.models import ServedModel
from serve.server.protocol import (
    HEADER_LENGTH,
    VERSION,
    InferRequest,
    ProtocolError,
    read_request,
    write_response,
)
from serve.server.repository import Repository
from serve.server.responses import json_response
from serve.server.service import Phase, Service

T = TypeVar("T")

# A JSON body of this size is parsed in about a millisecond; larger ones go to a thread,
# so that they delay nobody.
PARSE_INLINE_BYTES = 64 * 1024


def routes(service: Service, repository: Repository) -> Router:
    """-> the router to mount at /v2; of a demo alone it has the health routes only."""
    described = Descriptions(service, repository)
    models = ("/models/{name}", "/models/{name}/versions/{version}")
    found: list[BaseRoute] = []
    if service.settings.protocol:  # first, as routes are tried in their order
        infer = Infer(service)
        found += [Route(f"{model}/infer", infer, methods=["POST"]) for model in models]
    found += [Route("/health/live", described.live), Route("/health/ready", described.ready)]
    if service.settings.protocol:
        found.append(Route("/models/stats", described.all_statistics))  # before a model of that name
        found += [Route("/", described.server), Route("/repository/index", described.index, methods=["POST"])]
        if service.settings.model_control:
            for verb, change in (("load", repository.load), ("unload", repository.unload)):
                path = f"/repository/models/{{name}}/{verb}"
                found.append(Route(path, partial(change_model, change), methods=["POST"]))
        else:
            found.append(Route("/repository/models/{name}/{verb}", _not_controlled, methods=["POST"]))
        for model in models:
            found += [
                Route(model, described.model),
                Route(model + "/ready", described.model_ready),
                Route(model + "/config", described.config),
                Route(model + "/stats", described.statistics),
            ]
    return Router(found, redirect_slashes=False, default=_not_found)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(
        404,
        "the inference protocol has no such route; it has /v2/models/NAME[/config, /stats], "
        "POST /v2/models/NAME/infer, /v2/health/ready, POST /v2/repository/index, "
        "/v2/repository/models/NAME/load and /unload; for labels of a photograph see POST /classify",
    )


def find_model(service: Service, name: str, version: str | None = None) -> ServedModel:
    """-> the model that the path names. Raises HTTPException 404, or 503 while bundles are still loading."""
    if name in service.models and version in (None, VERSION):
        noted.note("model", name)
        return service.models[name]
    if name in {spec.name for spec in service.settings.models} and version in (None, VERSION):
        if service.phase is not Phase.STARTING:
            raise HTTPException(
                404, f"{name} is unloaded; load it with POST /v2/repository/models/{name}/load"
            )
        raise HTTPException(503, f"{name} is still loading", {"retry-after": "1"})
    raise HTTPException(
        404, f"there is no such model; this server has {', '.join(service.models) or 'none yet'}"
    )


def server_metadata(service: Service) -> dict[str, Any]:
    """-> the answer to GET /v2."""
    extensions = ["binary_tensor_data", "classification", "model_configuration", "statistics"]
    if service.settings.model_control:
        extensions.append("model_repository")
    return {"name": "ffl-serve", "version": ffl_deploy.__version__, "extensions": extensions}


class IndexRequest(msgspec.Struct):
    ready: bool = False


class ChangeRequest(msgspec.Struct):
    parameters: dict[str, str | int | float | bool] = {}


NOT_CONTROLLED = (
    "clients may not load or unload models of this server; start it with --model-control if they should"
)


async def _not_controlled(request: Request) -> Response:
    raise HTTPException(403, NOT_CONTROLLED)


async def change_model(change: Callable[[str], Awaitable[None]], request: Request) -> Response:
    """POST /v2/repository/models/NAME/load or /unload."""
    asked = await _small_json(request, ChangeRequest)
    try:
        refuse_parameters(asked.parameters)
        await change(request.path_params["name"])
    except (FflError, OSError) as error:
        raise HTTPException(400, str(error)) from error
    return json_response({})


async def _small_json(request: Request, kind: type[T]) -> T:
    """-> the body of a request that says little; an empty one says nothing. Raises HTTPException."""
    body = await request.body()
    if len(body) > PARSE_INLINE_BYTES:
        raise HTTPException(413, f"the body is larger than {PARSE_INLINE_BYTES} bytes")
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPException(400, f"the body is not a valid request: {error}") from None


def refuse_parameters(parameters: Iterable[str]) -> None:
    """Raises UsageError for what would load something else than the bundle of the command line."""
    if set(parameters) - {"unload_dependents"}:
        raise UsageError(
            "a bundle is loaded as it lies in its folder; config and files cannot be sent along."
        )


class Descriptions:
    """Everything under /v2 but inference: health, metadata, index."""

    def __init__(self, service: Service, repository: Repository) -> None:
        self.service, self.repository = service, repository

    async def server(self, request: Request) -> Response:
        return json_response(server_metadata(self.service))

    async def live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        ready = self.service.ready
        return json_response({"ready": ready, "phase": self.service.phase.value}, 200 if ready else 503)

    async def model(self, request: Request) -> Response:
        return json_response(self._model(request).signature.metadata())

    async def model_ready(self, request: Request) -> Response:
        name = self._model(request).name
        ending = self.service.ending
        return json_response({"name": name, "ready": not ending}, 503 if ending else 200)

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
        asked = await _small_json(request, IndexRequest)
        return json_response(self.repository.index(asked.ready))

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
            with noted.step("read"):
                body = await read_body(receive)
            async with WhileConnected(receive):
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
        results = model.results(outputs)

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
    text = header(scope, HEADER_LENGTH.encode())
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS):
        raise ProtocolError(f"{HEADER_LENGTH} has to be a whole number")
    return int(text)
