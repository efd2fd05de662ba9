"""What is refused before any application code sees it: foreign pages, strangers,
bodies that are too large or too slow.

Gradio leaves these holes when it is mounted: a POST with a foreign Origin is executed, and a `data:` URL in
JSON passes over `max_file_size`. Both close here, for the protocol and the demo alike.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import socket
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.server.headers import header
from serve.server.responses import Refused
from serve.server.settings import Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ADDRESSES = "<any address>"
PROBES = ("/v2/health/live", "/v2/health/ready")  # kubelets carry no token and name the pod's address as Host


ANY_HOST = "*"
OPEN_TO_ORIGINS = ("/v2", "/classify")
"""What pages that --allow-origin names may call; the demo is its own page's alone."""
NOT_OURS = "this server does not answer for that Host; start it with --allow-host NAME if it should"


def own_hosts(host: str, allowed: Sequence[str]) -> frozenset[str]:
    """-> the names that clients may call a server that listens on `host`; ANY_HOST among them: whatever they
    like. allowed: what --allow-host says."""
    names = {*LOOPBACK, *allowed}
    if host not in LOOPBACK:
        machine = socket.gethostname().lower()
        short = machine.partition(".")[0]
        names |= {host.lower(), machine, short, f"{short}.local", ADDRESSES}
    return frozenset(names)


class HostAndOrigin:
    """403 for a foreign Origin, 421 for a Host that is not ours
    (a foreign page's name rebound to this address).

    Args: origins: of pages elsewhere that may call what OPEN_TO_ORIGINS names, as in https://shop.example;
    hosts: names without port that clients may use. With ADDRESSES among them any address will do,
    since only a name can be rebound; with ANY_HOST anything will.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str] = ()) -> None:
        self.app, self.hosts, self.origins = app, frozenset(hosts), frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            return await self.app(scope, receive, send)
        host, origin = header(scope, b"host") or "", header(scope, b"origin")
        if not self._is_ours(_host_name(f"//{host}")):
            return await Refused(421, NOT_OURS)(scope, receive, send)
        # A page may call the server that it came from, port included, and no other page may.
        if origin is not None and not self._may_call(origin.lower(), host.lower(), scope["path"]):
            return await Refused(403, "requests from pages of another origin are refused")(
                scope, receive, send
            )
        return await self.app(scope, receive, send)

    def _may_call(self, origin: str, host: str, path: str) -> bool:
        if origin in self.origins and path.startswith(OPEN_TO_ORIGINS):
            return True
        return origin.partition("://")[2] == host

    def _is_ours(self, name: str | None) -> bool:
        if ANY_HOST in self.hosts or name in self.hosts:
            return True
        return ADDRESSES in self.hosts and name is not None and _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


class Token:
    """401 without the token: `Authorization: Bearer TOKEN`,
    or as the password of any user name (browsers ask for that)."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["path"] in PROBES
            or self._allowed(header(scope, b"authorization") or "")
        ):
            return await self.app(scope, receive, send)
        challenge = {"www-authenticate": 'Basic realm="ffl-serve", charset="UTF-8"'}
        return await Refused(401, "a valid token is needed", challenge)(scope, receive, send)

    def _allowed(self, authorization: str) -> bool:
        return has_token(authorization, self._token)


def has_token(authorization: str, token: bytes) -> bool:
    """-> whether the header or metadata of that name holds the token."""
    scheme, _, given = authorization.partition(" ")
    secret = given.strip().encode()
    if scheme.lower() == "basic":
        try:
            secret = base64.b64decode(secret, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(secret, token)


PIECE = 16 * 1024
"""Bytes of a body that have to arrive within `Limits.body_pause_seconds`."""
IDLE_SECONDS = 0.05
"""Without such a piece: from then on a body gives way where there is no room for another."""


class Room:
    """Bytes of all bodies that are being read or answered, over HTTP and gRPC; an address has its share.

    Where they do not suffice, bodies that wait for their rest end, those that have waited longest first: a
    client that holds all of its address's share, and sends nothing, keeps nobody else out.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._in_flight: Counter[str] = Counter()  # bytes, by address
        self.arriving: set[_Body] = set()  # those that wait for their rest

    def made(self, size: int, address: str) -> bool:
        """-> whether `size` further bytes may be held for `address`, others having given way if need be. What
        is announced only counts as it arrives: it may never."""
        limits, held = self._limits, self._in_flight
        share = limits.bytes_in_flight * (limits.share_of_address if address else 1)
        # how much of all, and of this address's own, has to go
        too_many, too_many_own = held.total() + size - limits.bytes_in_flight, held[address] + size - share
        if too_many <= 0 and too_many_own <= 0:
            return True
        # who goes, if that is enough
        ended: list[_Body] = []
        for body in sorted(self.arriving, key=_Body.idle, reverse=True):
            if body.idle() < IDLE_SECONDS:
                break
            if body.reserved and (too_many > 0 or body.address == address):
                ended.append(body)
                too_many -= body.reserved
                too_many_own -= body.reserved if body.address == address else 0
            if too_many <= 0 and too_many_own <= 0:
                for one in ended:
                    one.end()
                return True
        return False

    def take(self, size: int, address: str) -> bool:
        """-> whether `size` further bytes are held from now on."""
        if not self.made(size, address):
            return False
        self._in_flight[address] += size
        return True

    def give_back(self, size: int, address: str) -> None:
        self._in_flight[address] -= size
        if not self._in_flight[address]:
            del self._in_flight[address]


class Bodies:
    """413 for a body over its route's limit, 408 for one that does not arrive,
    503 when all bodies together are too many, or those of one address more than its share.

    Args: limit_of: path -> largest body in bytes.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, limit_of: Callable[[str], int], room: Room | None = None
    ) -> None:
        self.app, self.limits, self._limit_of = app, limits, limit_of
        self.room = room or Room(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # what its headers say of it
        limit = self._limit_of(scope["path"])
        announced = header(scope, b"content-length")
        size = int(announced) if announced is not None and announced.isdecimal() else 0
        if size > limit:
            return await _too_large(limit)(scope, receive, send)
        if header(scope, b"content-encoding") not in (None, "identity"):
            return await Refused(415, "send the body without Content-Encoding")(scope, receive, send)

        # while it arrives, and until it is answered
        body = _Body(self, receive, limit, (scope.get("client") or ("",))[0])
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            if body.refused and not started:
                return  # FastAPI turns any error of a body into its own 400; the refusal below is the answer
            started = True
            await send(message)

        try:
            if not self.room.made(size, body.address):
                body.refuse(_busy())
            await self.app(scope, body.receive, watched_send)
        except Refused:
            if started or body.refused is None:
                raise
        finally:
            self.room.give_back(body.reserved, body.address)
            if body.refused:  # what it was raised through holds the body
                body.refused.__traceback__ = None
        if body.refused and not started:
            await body.refused(scope, receive, send)
        return None


class _Body:
    """One request's body on its way in."""

    def __init__(self, owner: Bodies, receive: Receive, limit: int, address: str) -> None:
        self._owner, self._receive, self._limit, self.address = owner, receive, limit, address
        self._read = self.reserved = 0
        self._counted, self._waited = 0, 0.0  # bytes at the last piece that was progress, seconds since
        self._since = 0.0  # the loop's time at which it began to wait for what comes next
        self._complete = self._ended = False
        self._deadline: float | None = None
        self._scope: asyncio.Timeout | None = None
        self.refused: Refused | None = None

    def idle(self) -> float:
        """-> seconds without progress, while it is among those that arrive."""
        return self._waited + asyncio.get_running_loop().time() - self._since

    def end(self) -> None:
        """Give way to another one, while it is among those that arrive."""
        assert self._scope is not None
        self._ended = True
        self._owner.room.give_back(self.reserved, self.address)
        self._owner.room.arriving.discard(self)
        self.reserved = 0
        self._scope.reschedule(asyncio.get_running_loop().time())

    def reserve(self, size: int) -> None:
        if size > self.reserved:
            if not self._owner.room.take(size - self.reserved, self.address):
                self.refuse(_busy())
            self.reserved = size

    def refuse(self, refused: Refused) -> NoReturn:
        self.refused = refused
        raise refused

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the client to go away
        limits, arriving = self._owner.limits, self._owner.room.arriving
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + limits.body_seconds
        pause = limits.body_pause_seconds - self._waited
        self._since, message = now, None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(min(self._deadline, now + pause)) as self._scope:
                arriving.add(self)
                try:
                    message = await self._receive()
                finally:
                    arriving.discard(self)
        if message is None:
            slow = Refused(408, "the body arrives too slowly; send a smaller one")
            self.refuse(_busy() if self._ended else slow)
        self._read += len(message.get("body", b""))
        self._waited += asyncio.get_running_loop().time() - now
        if self._read - self._counted >= PIECE:  # a byte now and then is no progress
            self._counted, self._waited = self._read, 0.0
        self._complete = not message.get("more_body", False)
        if self._read > self._limit:
            self.refuse(_too_large(self._limit))
        self.reserve(self._read)
        return message


def _busy() -> Refused:
    """Each time another one: an exception keeps all that it was ever raised through, bodies among it."""
    return Refused(503, "the server is busy with other bodies; try again", {"retry-after": "1"})


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the body is larger than {limit} bytes; send fewer or smaller images")
