"""The few words of ASGI that the middlewares share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Refused(Exception):
    """A request that is answered with `status` and one sentence, wherever it is noticed."""

    def __init__(self, status: int, reason: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason  # the label of the metric
        self.headers = headers or {}


def header(scope: Scope, name: bytes) -> str | None:
    """-> the first header called `name` (lower case), or None."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return None


async def send_body(
    send: Send, status: int, parts: list[bytes | memoryview], content_type: str, headers: dict[str, str] | None = None
) -> None:
    """Send a whole response."""
    length = sum(len(part) for part in parts)
    fields = {"content-type": content_type, "content-length": str(length), **(headers or {})}
    raw = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": parts[0] if len(parts) == 1 else b"".join(parts)})


async def send_json(send: Send, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
    await send_body(send, status, [msgspec.json.encode(content)], "application/json", headers)


async def send_refusal(send: Send, refused: Refused) -> None:
    """`{"error": ...}`, the form of the inference protocol; the connection ends, since its body may be unread."""
    await send_json(send, refused.status, {"error": str(refused)}, {"connection": "close", **refused.headers})
