"""POST /classify: photographs in, labels out; for a client that knows nothing of tensors.

    curl -F file=@photo.jpg localhost:7860/classify

The pixels are decoded and resized here, as ffl-predict does it. Each image has one row in the answer, in the
order in which they came; one that cannot be read says why in its row and does not fail its neighbours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.datastructures import QueryParams, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from ffl_deploy.images import ImageError
from ffl_deploy.preprocessing import Pixels
from serve.server.exchange import REFUSALS, ClientGone, WhileConnected, read_body, refusal
from serve.server.headers import header
from serve.server.models import ServedModel
from serve.server.noted import step
from serve.server.protocol import ProtocolError
from serve.server.responses import json_response
from serve.server.service import Service
from serve.server.tracking import REQUEST_ID
from serve.server.v2 import find_model

PATH = "/classify"
TOP_K = 5
HOW = "send images as multipart/form-data, as in: curl -F file=@photo.jpg ADDRESS/classify"

NamedFile = tuple[str, bytes]
"""(the name that the client gave an image, or "", the file's content)."""


class Classify:
    """The route, as plain ASGI. Query: `model` (the first one if not given) and `top_k` (5)."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            raise HTTPException(405, HOW, {"allow": "POST"})
        query = QueryParams(scope["query_string"])
        model = find_model(self.service, query.get("model") or self.service.settings.models[0].name)
        try:
            with step("read"):
                files = await read_files(scope, receive, self.service.settings.limits.images_per_request)
            async with WhileConnected(receive):
                content = await self._answer(model, files, _top_k(query.get("top_k")))
        except (ClientGone, ClientDisconnect):
            return
        except REFUSALS as error:
            response = refusal(error, model.name)
        else:
            if header(scope, b"x-request-id") is not None:  # a stored answer says whose it is
                content["request_id"] = scope[REQUEST_ID]
            readable = any("error" not in row for row in content["images"])
            response = json_response(content, 200 if readable else 400)
        await response(scope, receive, send)

    async def _answer(self, model: ServedModel, files: Sequence[NamedFile], top_k: int) -> dict[str, Any]:
        # every image on its own: pixels, or what is wrong with it
        found = await asyncio.gather(*[self._pixels(model, data) for _, data in files])
        good = [pixels for pixels in found if not isinstance(pixels, ImageError)]

        # those that can be read, as one batch
        rows: list[dict[str, Any]] = []
        answers = iter(await self._predictions(model, good, top_k) if good else [])
        for (name, _), pixels in zip(files, found, strict=True):
            answer = (
                {"error": str(pixels), "code": pixels.code}
                if isinstance(pixels, ImageError)
                else next(answers)
            )
            rows.append({"file": name, **answer})
        return {"model": model.name, "variant": model.variant.name, "images": rows}

    async def _pixels(self, model: ServedModel, data: bytes) -> Pixels | ImageError:
        try:
            return (await self.service.decoders.prepare([data], model))[0]
        except ImageError as error:
            return error

    async def _predictions(
        self, model: ServedModel, images: Sequence[Pixels], top_k: int
    ) -> list[dict[str, Any]]:
        outputs = await model.infer(np.stack(images))
        predictions = [
            model.bundle.prediction(logits, probabilities, top_k)
            for logits, probabilities in zip(outputs.logits, outputs.probabilities, strict=True)
        ]
        promised = model.decisions.each(outputs, model.bundle.classes)
        return [
            {
                "label": one.label,
                "confidence": one.confidence,
                "top": [{"label": label, "confidence": confidence} for label, confidence in one.top],
                **promise,
            }
            for one, promise in zip(predictions, promised, strict=True)
        ]


async def read_files(scope: Scope, receive: Receive, most: int) -> list[NamedFile]:
    """-> the images of a request: the files of a form, or a body that is one image itself.
    Raises ProtocolError, ClientGone."""
    kind = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [("", await read_body(receive))]
    if kind != "multipart/form-data":
        raise ProtocolError(HOW)
    try:
        async with Request(scope, receive).form(max_files=most, max_fields=most) as form:
            uploads = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            files = [(upload.filename or "", await upload.read()) for upload in uploads]
    except (MultiPartException, HTTPException) as error:
        said = str(getattr(error, "detail", None) or error)
        raise ProtocolError(
            f"a request may hold at most {most} images; send several requests"
            if said.startswith("Too many")
            else f"the form cannot be read; {HOW}"
        ) from None
    if not files:
        raise ProtocolError(f"the form holds no file; {HOW}")
    return files


def _top_k(text: str | None) -> int:
    if text is None:
        return TOP_K
    if not (text.isascii() and text.isdecimal() and int(text[:9]) >= 1 and len(text) < 9):
        raise ProtocolError("top_k has to be a whole number, at least 1")
    return int(text)
