"""Connections that arrive while a port closes: answered, or told that nobody listens, and never reset."""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ffl_deploy.bundle import Bundle
from serve.server.closing_port import take_no_more

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")


def test_what_was_taken_is_still_accepted_and_nothing_new_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as port:
        before = [socket.create_connection(port.getsockname()) for _ in range(20)]
        for one in before:
            one.sendall(b"asked")
        take_no_more(port)
        late = socket.socket()
        late.settimeout(0.3)
        with pytest.raises(TimeoutError):
            late.connect(port.getsockname())
        accepted = [port.accept()[0] for _ in before]
        assert [one.recv(5) for one in accepted] == [b"asked"] * 20
        for one in [*before, *accepted, late]:
            one.close()


def test_a_new_connection_for_each_request_is_never_reset(
    two_bundles: tuple[Bundle, Bundle], serve_process: Callable[..., Any]
) -> None:
    """As nginx asks unless told otherwise; of 32 such clients 2 to 18 were reset."""
    outcomes: Counter[str] = Counter()
    ended = threading.Event()

    def ask(host: str, port: int) -> None:
        while not ended.is_set():
            connection = http.client.HTTPConnection(host, port, timeout=20)
            try:
                connection.request("GET", "/v2/models/fused", headers={"connection": "close"})
                outcomes[str(connection.getresponse().status)] += 1
            except ConnectionRefusedError:
                return
            except TimeoutError:
                outcomes["timeout"] += 1
                return
            except (ConnectionError, http.client.HTTPException) as error:
                outcomes[type(error).__name__] += 1
                return
            finally:
                with contextlib.suppress(OSError):
                    connection.close()

    with serve_process(str(two_bundles[0].folder), "--no-demo", "--drain", "0.5") as running:
        host, _, port = running.address.partition(":")
        threads = [threading.Thread(target=ask, args=(host, int(port))) for _ in range(32)]
        for thread in threads:
            thread.start()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
        ended.set()
        for thread in threads:
            thread.join()
    assert set(outcomes) == {"200"}, outcomes
