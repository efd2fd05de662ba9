"""The token is needed everywhere but for probes, and shows nowhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from ffl_deploy.bundle import Bundle
from serve.server.settings import ModelSpec, Settings

Start = Callable[..., contextlib.AbstractContextManager[Any]]


@pytest.fixture
def locked(two_bundles: tuple[Bundle, Bundle], start_server: Start) -> Iterator[Any]:
    settings = Settings(
        (ModelSpec("fused", two_bundles[0].folder),), demo=False, token="correct-horse-battery"
    )
    with start_server(settings) as running:
        yield running


def test_the_token_is_needed_everywhere_but_for_probes(locked: Any) -> None:
    from tritonclient import http as triton

    for path in ("/v2", "/v2/models/fused", "/metrics", "/"):
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic !"},
            {"authorization": "correct-horse-battery"},
        ):
            refused = httpx.get(locked.url + path, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic")
        assert (
            httpx.get(
                locked.url + path, headers={"authorization": "Bearer correct-horse-battery"}
            ).status_code
            == 200
        )
        assert httpx.get(locked.url + path, auth=("anyone", "correct-horse-battery")).status_code == 200
    assert httpx.get(f"{locked.url}/v2/health/ready").status_code == 200
    with contextlib.closing(triton.InferenceServerClient(locked.address)) as client:
        assert (
            client.get_model_metadata("fused", headers={"Authorization": "Bearer correct-horse-battery"})[
                "name"
            ]
            == "fused"
        )


def test_the_token_never_shows() -> None:
    assert "secret" not in repr(Settings((), token="secret-secret-secret"))
