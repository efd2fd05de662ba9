"""Answers that every part of the server gives in one form: JSON,
and refusals as the inference protocol writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """-> a response with anything msgspec can encode."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


class Refused(Exception):
    """A request that is answered with `status` and one sentence, wherever it is noticed.

    Also the ASGI application that gives this answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer `{"error": ...}` and end the connection, since the request's body may be unread."""
        response = json_response({"error": str(self)}, self.status, {"connection": "close", **self.headers})
        await response(scope, receive, send)
