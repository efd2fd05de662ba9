"""The gRPC port: calls come in bounded, errors go out as statuses, health is that of the server.

Every method reads its message itself, as if a client sent several: gRPC's own way hands a call to Python once
its message has arrived, however slowly, and with however many beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import grpc
from starlette.exceptions import HTTPException

from ffl_deploy.errors import FflError, UsageError
from serve.server import noted
from serve.server.exchange import REFUSALS, refused_as
from serve.server.limits import has_token
from serve.server.repository import Repository
from serve.server.rpc.messages import HEALTH, INFERENCE, message, parsed, pool
from serve.server.rpc.methods import Methods
from serve.server.service import Service
from serve.server.tracking import Asked, RequestIds, Span, record

Code = grpc.StatusCode
CODES = {
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    408: Code.DEADLINE_EXCEEDED,
    413: Code.RESOURCE_EXHAUSTED,
    500: Code.INTERNAL,
    503: Code.UNAVAILABLE,
}
OPEN_TO_ALL = ("ServerLive", "ServerReady", "Check", "Watch")  # as /v2/health is
SMALL = 64 * 1024
"""Bytes of a message that is no inference request."""
PATIENCE_SECONDS, LEAST_SECONDS = 0.25, 0.02
"""That a message may take where others wait for its place, and where many do."""
QUIET_SECONDS = 0.5  # twice so long without a call it is waited for gRPC to say that it has stopped
LOOK_SECONDS = 0.2  # between two looks of Health.Watch


class Failed(Exception):
    """A call that ends with a status and one sentence."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


class Reading:
    """Calls whose message is on its way: each may become as large as a message may be, so only so many are
    read at a time. Where one more comes, the one that has waited longest ends, once it has had its time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._since: dict[asyncio.Timeout, float] = {}  # the longest first
        self._next = asyncio.Lock()
        self._waiting = 0

    @contextlib.asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """Raises TimeoutError in the block after so many seconds, or where others need its place."""
        loop = asyncio.get_running_loop()
        self._waiting += 1
        try:
            async with self._next:
                while len(self._since) >= self._most:
                    longest, since = next(iter(self._since.items()))
                    left = since + max(LEAST_SECONDS, PATIENCE_SECONDS / self._waiting) - loop.time()
                    if left <= 0:
                        del self._since[longest]
                        longest.reschedule(loop.time())
                    else:
                        await asyncio.sleep(min(left, LEAST_SECONDS))
        finally:
            self._waiting -= 1
        async with asyncio.timeout(seconds) as scope:
            self._since[scope] = loop.time()
            try:
                yield
            finally:
                self._since.pop(scope, None)


class Calls:
    """What every call passes: who asks, how much, and what becomes of it."""

    def __init__(self, service: Service) -> None:
        self.service, limits = service, service.settings.limits
        self.limits = limits
        self.largest = min(limits.body_bytes, limits.message_bytes)
        self.reading = Reading(max(1, limits.bytes_in_flight // self.largest))
        self.streams = self.open = 0  # calls that have no answer yet
        self._token = service.settings.token.encode() if service.settings.token else None
        self._ids = RequestIds()

    @contextlib.asynccontextmanager
    async def tracked(self, name: str, context: Any) -> AsyncIterator[None]:
        """Count, time and log a call; what is raised inside becomes its status, and goes no further.

        Not by `context.abort`: gRPC keeps the exception that this raises for ever, and with it the frames
        that it came through and their message, up to 16 MiB a refused call.
        """
        metrics, began, code = self.service.metrics, time.perf_counter(), Code.OK
        metadata = {
            key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
        }
        said = {"method": f"grpc {name}"}
        request_id = self._ids(metadata.get("x-request-id", ""), said)
        notes = noted.begin(said)
        context.set_trailing_metadata((("x-request-id", request_id),))
        failed: tuple[grpc.StatusCode, str] | None = None
        metrics.in_flight.inc()
        self.open += 1
        try:
            given, asked_for = metadata.get("authorization", ""), name not in OPEN_TO_ALL
            if self._token and asked_for and not has_token(given, self._token):
                raise Failed(401, "a valid token is needed; send metadata authorization: Bearer TOKEN")
            yield
        except asyncio.CancelledError:
            code = Code.CANCELLED
            raise
        except Failed as error:
            failed = CODES[error.status], str(error)
        except HTTPException as error:
            failed = CODES[error.status_code], str(error.detail)
        except FflError as error:
            failed = Code.INVALID_ARGUMENT, str(error)
        except REFUSALS as error:
            status, said = refused_as(error, "the model")
            failed = CODES[status], said["error"]
        except Exception:
            self.service.log.exception("a call failed", extra={"method": name, "request_id": request_id})
            failed = Code.INTERNAL, "the server failed on this request; its log says why"
        finally:
            metrics.in_flight.dec()
            self.open -= 1
            code = failed[0] if failed else code
            route = f"grpc_{'infer' if 'Infer' in name else 'other'}"
            asked = Asked(notes, address_of(context), request_id, name in OPEN_TO_ALL, metadata, began)
            span = partial(_grpc_span, name, code)
            record(self.service, asked, route, code.name, span, failed=failed is not None)
        if failed:
            context.set_code(failed[0])
            context.set_details(failed[1])

    @contextlib.asynccontextmanager
    async def stream(self) -> AsyncIterator[None]:
        """A call that a client may hold open."""
        if self.streams >= self.limits.streams:
            raise Failed(503, "the server holds too many streams; try again later")
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    @contextlib.asynccontextmanager
    async def read(self, kind: Any, largest: int, context: Any) -> AsyncIterator[Any]:
        """The next message, or None at the end; its bytes are counted until the block ends.

        Not by the iterator that gRPC gives a call: that is a circle with its generator, which holds the last
        message, of up to 16 MiB, until the interpreter next looks for circles.
        """
        address = address_of(context)
        pause = self.limits.stream_pause_seconds
        try:
            async with self.reading.within(pause):
                with noted.step("read"):
                    data = await context.read()
        except TimeoutError:
            raise Failed(408, "no message has arrived in time") from None
        if data is grpc.aio.EOF:
            yield None
            return
        if len(data) > largest:
            raise Failed(413, f"the message is larger than {largest} bytes")
        if not self.service.room.take(len(data), address):
            raise Failed(503, "the server is busy with other bodies; try again")
        try:
            yield parsed(kind, data)
        finally:
            self.service.room.give_back(len(data), address)


FAULTS = (Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.UNIMPLEMENTED, Code.INTERNAL, Code.UNAVAILABLE)
"""Of a server; the other statuses are the client's."""


def _grpc_span(method: str, code: grpc.StatusCode) -> Span:
    """https://opentelemetry.io/docs/specs/semconv/rpc/grpc/."""
    service = HEALTH if method in ("Check", "Watch") else INFERENCE
    attributes: dict[str, str | int] = {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": method,
        "rpc.grpc.status_code": code.value[0],
    }
    return Span(f"{service}/{method}", attributes, code.name if code in FAULTS else "")


def address_of(context: Any) -> str:
    """-> `127.0.0.1` of gRPC's `ipv4:127.0.0.1:5` and `ipv6:%5B::1%5D:5`."""
    return str(context.peer()).partition(":")[2].rpartition(":")[0]


class Handlers:
    """The methods as gRPC calls them."""

    def __init__(self, calls: Calls, methods: Methods, service: Service) -> None:
        self.calls, self.methods, self.service = calls, methods, service

    def of_inference(self) -> dict[str, Any]:
        described = pool().FindServiceByName(INFERENCE)
        handlers = {}
        for method in described.methods:
            kind = message(method.input_type.full_name)
            if method.name == "ModelStreamInfer":
                handlers[method.name] = grpc.stream_stream_rpc_method_handler(self._stream, None, _serialized)
            else:
                answer = getattr(self.methods, method.name)
                handlers[method.name] = grpc.stream_unary_rpc_method_handler(
                    self._unary(method.name, kind, answer), None, _serialized
                )
        return handlers

    def of_health(self) -> dict[str, Any]:
        return {
            "Check": grpc.stream_unary_rpc_method_handler(
                self._unary("Check", message(f"{HEALTH}CheckRequest"), self._check), None, _serialized
            ),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch, None, _serialized),
        }

    def _unary(
        self, name: str, kind: Any, answer: Callable[[Any], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        largest = self.calls.largest if name == "ModelInfer" else SMALL

        async def call(messages: Any, context: Any) -> Any:
            async with (
                self.calls.tracked(name, context),
                self.calls.read(kind, largest, context) as asked,
            ):
                if asked is None:
                    raise Failed(400, "the call has no message")
                return await answer(asked)
            return None  # refused: of a call with a status there is no message

        return call

    async def _stream(self, messages: Any, context: Any) -> AsyncIterator[Any]:
        """One request after the other; what is wrong with one is said in its answer, the next may come."""
        kind, answer = message("ModelInferRequest"), message("ModelStreamInferResponse")
        largest = self.calls.largest
        async with self.calls.tracked("ModelStreamInfer", context), self.calls.stream():
            while True:
                async with self.calls.read(kind, largest, context) as asked:
                    if asked is None:
                        return
                    try:
                        response = answer(infer_response=await self.methods.ModelInfer(asked))
                    except REFUSALS as error:
                        response = answer(error_message=refused_as(error, asked.model_name)[1]["error"])
                        response.infer_response.id = asked.id
                    except HTTPException as error:
                        response = answer(error_message=str(error.detail))
                        response.infer_response.id = asked.id
                yield response

    async def _check(self, asked: Any) -> Any:
        status = self._status(asked.service)
        if status == SERVICE_UNKNOWN:
            raise Failed(404, f"there is no such service; this server has {INFERENCE}")
        return message(f"{HEALTH}CheckResponse")(status=status)

    async def _watch(self, messages: Any, context: Any) -> AsyncIterator[Any]:
        """What it is now, and whenever that changes."""
        async with self.calls.tracked("Watch", context), self.calls.stream():
            kind = message(f"{HEALTH}CheckRequest")
            async with self.calls.read(kind, SMALL, context) as asked:
                watched = asked.service if asked is not None else ""
            said = None
            while True:
                if (status := self._status(watched)) != said:
                    said = status
                    yield message(f"{HEALTH}CheckResponse")(status=status)
                await asyncio.sleep(LOOK_SECONDS)

    def _status(self, service: str) -> int:
        if service not in ("", INFERENCE):
            return SERVICE_UNKNOWN
        return SERVING if self.service.ready else NOT_SERVING


SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


def _serialized(answer: Any) -> bytes:
    return answer.SerializeToString()


@contextlib.asynccontextmanager
async def grpc_port(service: Service, repository: Repository) -> AsyncIterator[None]:
    """Listen while the block runs. Raises UsageError where the port cannot be had."""
    settings, limits = service.settings, service.settings.limits
    server = grpc.aio.server(
        maximum_concurrent_rpcs=limits.connections,
        options=[
            ("grpc.max_receive_message_length", min(limits.body_bytes, limits.message_bytes)),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", limits.header_bytes),
            ("grpc.absolute_max_metadata_size", limits.header_bytes),
            ("grpc.max_concurrent_streams", limits.silent_connections),
            ("grpc.max_allowed_incoming_connections", limits.connections),
            ("grpc.server_handshake_timeout_ms", round(limits.header_seconds * 1000)),
            ("grpc.max_connection_idle_ms", round(limits.stream_pause_seconds * 1000)),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.http2.lookahead_bytes", SMALL),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.so_reuseport", 0),
        ],
    )
    calls = Calls(service)
    handlers = Handlers(calls, Methods(service, repository), service)
    for name, found in ((INFERENCE, handlers.of_inference()), (HEALTH, handlers.of_health())):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, found),))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        service.grpc_port = server.add_insecure_port(f"{host}:{settings.grpc_port}")
    except RuntimeError as error:
        raise UsageError(
            f"cannot listen on {host}:{settings.grpc_port} for gRPC; choose another with --grpc-port."
        ) from error
    await server.start()
    stopping: list[asyncio.Task[None]] = []

    def stop() -> None:  # the port closes with the other one; calls in flight get what requests get
        stopping.append(asyncio.create_task(server.stop(settings.shutdown_seconds)))

    service.endless.append(stop)
    try:
        yield
    finally:
        if not stopping:
            stop()
        await ended(stopping[0], calls, settings.shutdown_seconds)


async def ended(stopping: asyncio.Future[None], calls: Calls, seconds: float) -> None:
    """Wait until gRPC says that it has stopped, as long as there are calls and at most so many seconds.

    Its word does not always come: of a client that calls at that very moment the accepting task waits for
    ever (seen once in a dozen stops under load, grpcio 1.85).
    """
    loop = asyncio.get_running_loop()
    deadline, quiet = loop.time() + seconds + 2 * QUIET_SECONDS, 0
    while quiet < 2 and loop.time() < deadline:
        done, _ = await asyncio.wait({stopping}, timeout=QUIET_SECONDS)
        if done:
            return await stopping
        quiet = 0 if calls.open else quiet + 1
    stopping.cancel()
    return None
