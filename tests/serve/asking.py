"""Requests to a server, and waiting for what they bring about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ffl_deploy.bundle import Bundle


def pixels_of(bundle: Bundle, count: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def json_request(images: np.ndarray, **fields: Any) -> dict[str, Any]:
    return {
        "inputs": [
            {"name": "images", "shape": list(images.shape), "datatype": "UINT8", "data": images.tolist()}
        ],
        **fields,
    }


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
