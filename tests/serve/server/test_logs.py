"""The log is one JSON object a line, whatever clients send and libraries print."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx

from ffl_deploy.bundle import Bundle

Start = Callable[..., contextlib.AbstractContextManager[Any]]


def test_log_lines_cannot_be_forged() -> None:
    import logging

    from serve.server.logs import JsonFormatter

    record = logging.LogRecord("x", 20, "", 0, 'a\n{"level": "error"}', None, None)
    record.path = "/\r\nfake"
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["path"] == "/\r\nfake"


def test_what_libraries_print_is_logged_a_record_a_line() -> None:
    code = """
import logging, logging.config, os, sys
from serve.server.logs import log_config
from serve.server.stray import stray_output_logged
print("before", file=sys.stderr)
with stray_output_logged() as real:
    logging.config.dictConfig(log_config("json", real))
    print("Traceback (most recent call last):\\n  in a library\\n", file=sys.stderr)
    print("progress", end="")
    print(" done")
    os.write(2, b"Fax4Decode: bad code\\n{")
    print("x" * 5000, file=sys.stderr)
    logging.getLogger("ffl.serve").warning("ours")
print("after", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    first, *lines, last = done.stderr.splitlines()
    assert (first, last, done.stdout) == ("before", "after", "")
    records = [json.loads(line) for line in lines]
    assert {(record["message"], record.get("stream")) for record in records} == {
        ("Traceback (most recent call last):", "stderr"),
        ("  in a library", "stderr"),
        ("progress done", "stdout"),
        ("Fax4Decode: bad code", "native"),
        ("{", "native"),
        ("x" * 2000, "stderr"),
        ("ours", None),
    }


def test_the_log_of_bad_demo_requests_is_one_object_a_line(
    two_bundles: tuple[Bundle, Bundle], serve_process: Start
) -> None:
    """Seven of them gave 80 lines of Gradio's tracebacks."""
    with serve_process(str(two_bundles[0].folder), "--access-log") as running:
        for content in (b'{"data": [1]}', b'{"data": "x"}', b"{}", b'{"data": [{"path": null}]}'):
            httpx.post(f"{running.url}/gradio_api/call/classify", content=content)
        httpx.post(
            f"{running.url}/gradio_api/queue/join",
            json={"data": [], "fn_index": 10**6, "session_hash": "x"},
        )
        httpx.post(f"{running.url}/gradio_api/run/nothing", content=b'{"data": []}')
        deadline = time.monotonic() + 60  # a request is logged once it has been answered
        while running.read_log().count('"status"') < 6 and time.monotonic() < deadline:
            time.sleep(0.05)
        records = [json.loads(line) for line in running.read_log().split("\n")[:-1]]
    assert sum("status" in record for record in records) >= 6
