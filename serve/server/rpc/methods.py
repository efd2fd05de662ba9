"""What each method of the inference service answers, apart from how calls come in and errors go out."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException

from serve.server.models import ServedModel
from serve.server.protocol import VERSION
from serve.server.repository import Repository
from serve.server.rpc.infer import read_infer, write_infer
from serve.server.rpc.messages import message
from serve.server.service import Service
from serve.server.v2 import (
    NOT_CONTROLLED,
    PARSE_INLINE_BYTES,
    find_model,
    refuse_parameters,
    server_metadata,
)

Method = Callable[[Any], Awaitable[Any]]
"""A request's message -> its answer's. Raises REFUSALS, HTTPException, FflError."""


class Methods:
    """One method each, of the name that the service has for it."""

    def __init__(self, service: Service, repository: Repository) -> None:
        self.service, self.repository = service, repository

    async def ServerLive(self, asked: Any) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def ServerReady(self, asked: Any) -> Any:
        return message("ServerReadyResponse")(ready=self.service.ready)

    async def ModelReady(self, asked: Any) -> Any:
        loaded = asked.name in self.service.models and asked.version in ("", VERSION)
        return message("ModelReadyResponse")(ready=loaded and not self.service.ending)

    async def ServerMetadata(self, asked: Any) -> Any:
        return message("ServerMetadataResponse")(**server_metadata(self.service))

    async def ModelMetadata(self, asked: Any) -> Any:
        said = self._model(asked.name, asked.version).signature.metadata()
        properties = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in said.pop("parameters").items()
        }
        return message("ModelMetadataResponse")(**said, properties=properties)

    async def ModelConfig(self, asked: Any) -> Any:
        model = self._model(asked.name, asked.version)
        config = model.signature.config(self.service.settings.max_batch)
        return message("ModelConfigResponse")(config=config)

    async def ModelStatistics(self, asked: Any) -> Any:
        models = [self._model(asked.name, asked.version)] if asked.name else self.service.models.values()
        described = [model.statistics.described(model.name, VERSION) for model in models]
        return message("ModelStatisticsResponse")(model_stats=described)

    async def RepositoryIndex(self, asked: Any) -> Any:
        return message("RepositoryIndexResponse")(models=self.repository.index(asked.ready))

    async def RepositoryModelLoad(self, asked: Any) -> Any:
        await self._change(self.repository.load, asked)
        return message("RepositoryModelLoadResponse")()

    async def RepositoryModelUnload(self, asked: Any) -> Any:
        await self._change(self.repository.unload, asked)
        return message("RepositoryModelUnloadResponse")()

    async def ModelInfer(self, asked: Any) -> Any:
        model = self._model(asked.model_name, asked.model_version)
        statistics, began = model.statistics, time.perf_counter()
        counted = statistics.fail
        try:
            # what is asked
            if asked.ByteSize() > PARSE_INLINE_BYTES:
                request = await asyncio.to_thread(read_infer, asked, model.signature)
            else:
                request = read_infer(asked, model.signature)
            images = request.images
            if images is None:
                images = await self.service.decoders.prepare(request.encoded, model)
            statistics.input.add(time.perf_counter() - began)

            # the model, in a batch with whoever asks at the same time, over HTTP too
            outputs = await model.infer(images)
            results = model.results(outputs)

            ran = time.perf_counter()
            response = write_infer(model.signature, request, results)
            statistics.output.add(time.perf_counter() - ran)
            counted = statistics.success
            return response
        finally:
            counted.add(time.perf_counter() - began)

    async def _change(self, change: Callable[[str], Awaitable[None]], asked: Any) -> None:
        if not self.service.settings.model_control:
            raise HTTPException(403, NOT_CONTROLLED)
        refuse_parameters(asked.parameters)
        await change(asked.model_name)

    def _model(self, name: str, version: str) -> ServedModel:
        return find_model(self.service, name, version or None)
