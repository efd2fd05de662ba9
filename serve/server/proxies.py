"""Behind a reverse proxy: the prefix that clients see, and who and what they are, as a trusted proxy says.

The outermost middleware: what stands inside it sees the client's own address, scheme and Host, and paths that
begin at the server's root. `X-Forwarded-*` of anybody else is taken away, since Gradio believes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

FORWARDED = (b"x-forwarded-", b"x-gradio-server", b"forwarded", b"x-real-ip")
"""How the headers begin that speak for a client."""


class Forwarded:
    """Args: root_path: the prefix under which clients reach this server, whether the proxy takes it away or
    not; proxies: addresses and networks whose `X-Forwarded-For`, `-Proto` and `-Host` are believed."""

    def __init__(self, app: ASGIApp, root_path: str, proxies: Sequence[str]) -> None:
        self.app, self.root_path, self._proxies = app, root_path, frozenset(proxies)
        self._believing = ProxyHeadersMiddleware(app, list(proxies))  # type: ignore[arg-type]
        self._believed = self._believing.trusted_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.root_path and scope["path"] == self.root_path:  # the page's own addresses are relative
            return await RedirectResponse(f"{self.root_path}/", 307)(scope, receive, send)
        scope = self._at_the_root(dict(scope))
        if not self._proxies or (scope.get("client") or ("",))[0] not in self._believed:
            scope["headers"] = _without(scope, FORWARDED)
            return await self.app(scope, receive, send)
        if host := Headers(scope=scope).get("x-forwarded-host", "").split(",")[0].strip():
            scope["headers"] = [(b"host", host.encode("latin-1")), *_without(scope, (b"host",))]
        return await self._believing(scope, receive, send)  # type: ignore[arg-type]

    def _at_the_root(self, scope: Scope) -> Scope:
        if self.root_path and scope["path"].startswith(f"{self.root_path}/"):
            scope["path"] = scope["path"].removeprefix(self.root_path)
            scope["raw_path"] = scope.get("raw_path", b"").removeprefix(self.root_path.encode())
        return scope


def _without(scope: Scope, beginnings: tuple[bytes, ...]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in scope["headers"] if not name.startswith(beginnings)]
