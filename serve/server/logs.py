"""Structured logs: one JSON object a line on stderr, or plain text where a person reads along."""

from __future__ import annotations

import json
import logging
import time
from typing import Any, TextIO

LOGGER = "ffl.serve"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, and whatever was passed as `extra`. Text of clients is escaped,
    so it cannot forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        milliseconds = f"{record.msecs:03.0f}Z"
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(record.created)) + milliseconds,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """`12:34:56 warning message (key=value ...)`."""

    def format(self, record: logging.LogRecord) -> str:
        extra = " ".join(f"{key}={value!r}" for key, value in vars(record).items() if key not in _STANDARD)
        text = (
            f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.levelname.lower():7} "
            f"{record.getMessage()}"
        )
        text += f" ({extra})" if extra else ""
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def log_config(log_format: str, stream: TextIO) -> dict[str, Any]:
    """-> a `logging.config.dictConfig` for this server and uvicorn. log_format: `json` or `text`."""
    formatter = {"json": "serve.server.logs.JsonFormatter", "text": "serve.server.logs.TextFormatter"}[
        log_format
    ]
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"ours": {"()": formatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "stream": stream, "formatter": "ours"}},
        "loggers": {
            LOGGER: {"handlers": ["stderr"], "level": "INFO", "propagate": False},
            "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        },
        "root": {"handlers": ["stderr"], "level": "WARNING"},
    }
