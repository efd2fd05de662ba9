"""A server process from opening its port to its last answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from ffl_deploy.errors import UsageError
from ffl_deploy.host import return_freed_memory
from serve.server.closing_port import accept_the_rest
from serve.server.connections import bounded
from serve.server.limits import LOOPBACK
from serve.server.logs import log_config
from serve.server.models import check_specs
from serve.server.offline import private_environment
from serve.server.service import Phase, Service
from serve.server.settings import Settings
from serve.server.stray import stray_output_logged

# Longer than what clients and balancers keep idle connections for,
# so that they close first and never meet a closed one.
KEEP_ALIVE_SECONDS = 75
BACKLOG = 2048
SETTLE_SECONDS = 1.0

CreateApp = Callable[[Settings, Callable[[], None]], Starlette]
"""(settings, what to call when loading failed) -> an application whose `state.service` is its Service."""


class DrainingServer(uvicorn.Server):
    """Ends in three steps, so that no request that was accepted is lost.

    A signal makes the server not ready: balancers turn away, everybody is still answered. Then the port
    closes and every answer ends its connection. What is idle after SETTLE_SECONDS is closed at last: closing
    it at once would reset clients whose next request is already on its way.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, look: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        super().__init__(config)
        self.service, self.look = service, look
        self.on_terminal = os.isatty(0) or os.isatty(2)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._looking: set[asyncio.Future[None]] = set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.phase is not Phase.READY:
            return super().handle_exit(sig, frame)  # nothing to drain, or the second signal: now
        self.service.become(Phase.DRAINING)
        self.service.log.info(
            "draining",
            extra={"signal": signal.Signals(sig).name, "seconds": self.service.settings.drain_seconds},
        )
        timer = threading.Timer(self.service.settings.drain_seconds, self.stop)
        timer.daemon = True
        timer.start()
        return None

    def handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        """SIGHUP: the terminal is gone, which ends the server as SIGTERM does; without one, look for replaced
        bundles."""
        if self.on_terminal:
            self.handle_exit(sig, frame)
        elif self.service.phase is Phase.READY and self.loop is not None:
            self.service.log.info("looking for replaced bundles", extra={"signal": "SIGHUP"})
            self.loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        task = asyncio.ensure_future(self.look())
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def stop(self) -> None:
        """Go on to `shutdown`; may be called from any thread."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # what the kernel has taken is accepted before the port closes
        await accept_the_rest(sockets or (), self.service.settings.shutdown_seconds)
        for server in self.servers:
            server.close()
        self.service.become(Phase.CLOSING)
        deadline = time.monotonic() + min(SETTLE_SECONDS, self.service.settings.shutdown_seconds)
        while self.server_state.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def serve(settings: Settings, create_app: CreateApp) -> None:
    """Serve until SIGTERM or SIGINT has drained; every temporary file lies in one folder, removed at the end.

    Raises UsageError, and CheckError when a bundle does not verify.
    """
    return_freed_memory()
    with private_environment():
        check_specs(settings.models, settings.public_key)
        run_until_signal(settings, create_app)


def run_until_signal(settings: Settings, create_app: CreateApp) -> None:
    """The part of `serve` that listens. Raises what it raises."""
    # where programs read the log, nothing but the log comes there
    stray = stray_output_logged() if settings.log_format == "json" else contextlib.nullcontext(sys.stderr)
    with open_port(settings.host, settings.port) as port, stray as log:
        address, number = port.getsockname()[:2]
        # the application, which may stop the server that it is given to
        app = create_app(settings, lambda: server.stop())
        service: Service = app.state.service
        service.url = f"http://{f'[{address}]' if ':' in address else address}:{number}"

        config = uvicorn.Config(
            app,
            log_config=log_config(settings.log_format, log),
            access_log=False,  # serve/server/tracking.py
            server_header=False,
            lifespan="on",
            http=bounded(settings.limits),
            ws="none",
            backlog=BACKLOG,
            limit_concurrency=settings.limits.connections,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(settings.shutdown_seconds),
            proxy_headers=False,
        )
        server = DrainingServer(config, service, app.state.repository.look)

        # uvicorn raises the signals that it has caught once more when it is done: a drained SIGTERM is a
        # success. A signal that comes before uvicorn listens has to end it all the same.
        for caught in (signal.SIGTERM, signal.SIGINT):
            signal.signal(caught, lambda number, frame: server.stop())
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signal.SIGHUP, server.handle_hangup)
        if settings.host not in LOOPBACK and not settings.token:
            service.log.warning(
                "other machines can reach this server without a token; see --token-file",
                extra={"host": settings.host},
            )
        if settings.token_file is not None and readable_by_all(settings.token_file):
            service.log.warning(
                "every user of this machine can read the token; run: chmod o= FILE",
                extra={"file": str(settings.token_file)},
            )
        server.run(sockets=[port])
    if service.failure:
        raise service.failure


def readable_by_all(path: Path) -> bool:
    """-> whether a file of a secret is one for everybody; not its group, which Kubernetes gives its own."""
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:  # a pipe that has been read
        return False


def words_of(error: OSError) -> str:
    """-> the system's words for it; asyncio and socket add the address, which the sentence has already."""
    return os.strerror(error.errno).lower() if error.errno else str(error)


def open_port(host: str, port: int) -> socket.socket:
    """-> a bound socket. Raises UsageError when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--host {host!r} is no address of this machine ({reason}).") from error
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port} ({words_of(error)}); choose another with --port or --host."
        ) from error
