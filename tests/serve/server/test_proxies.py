"""Behind a reverse proxy: prefixes, what a trusted one says of a client, and pages elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from ffl_deploy.errors import UsageError
from serve.command import parse_arguments
from serve.server.limits import HostAndOrigin
from serve.server.proxies import Forwarded

StatusesBehind = Callable[[Callable[[Any], Any], dict[str, Any]], list[int]]

Headers = dict[str, str]


def seen(path: str, headers: Headers, *, prefix: str = "", proxies: tuple[str, ...] = ()) -> dict[str, Any]:
    """-> the scope that an application behind Forwarded sees, or the redirection that it never sees."""
    found: dict[str, Any] = {}

    async def application(scope: Any, receive: Any, send: Any) -> None:
        found.update(scope)

    async def send(message: Any) -> None:
        found.update(message)

    scope = {
        "type": "http",
        "path": path,
        "raw_path": path.encode(),
        "scheme": "http",
        "client": ("10.1.2.3", 5),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(Forwarded(application, prefix, proxies)(scope, None, send))  # type: ignore[arg-type]
    return found


CLAIMED = {
    "host": "127.0.0.1:7860",
    "x-forwarded-for": "203.0.113.9, 10.9.9.9",
    "x-forwarded-proto": "https",
    "x-forwarded-host": "models.example",
}


def test_a_trusted_proxy_says_who_asks_and_how() -> None:
    scope = seen("/", CLAIMED, proxies=("10.0.0.0/8",))
    assert scope["client"][0] == "203.0.113.9"
    assert scope["scheme"] == "https"
    assert dict(scope["headers"])[b"host"] == b"models.example"
    assert [name for name, _ in scope["headers"]].count(b"host") == 1


@pytest.mark.parametrize("proxies", [(), ("10.1.2.4",), ("192.168.0.0/16",)])
def test_nobody_else_is_believed(proxies: tuple[str, ...]) -> None:
    scope = seen("/", {**CLAIMED, "x-gradio-server": "http://evil.example"}, proxies=proxies)
    assert (scope["client"], scope["scheme"]) == (("10.1.2.3", 5), "http")
    assert scope["headers"] == [(b"host", b"127.0.0.1:7860")]


@pytest.mark.parametrize(
    ("path", "inside"),
    [("/app/v2", "/v2"), ("/v2", "/v2"), ("/app/", "/"), ("/application", "/application"), ("/", "/")],
)
def test_a_prefix_is_taken_away_where_the_proxy_left_it(path: str, inside: str) -> None:
    scope = seen(path, {}, prefix="/app")
    assert (scope["path"], scope["raw_path"]) == (inside, inside.encode())


def test_the_prefix_alone_leads_to_the_page() -> None:
    answer = seen("/app", {}, prefix="/app")
    assert (answer["status"], dict(answer["headers"])[b"location"]) == (307, b"/app/")


@pytest.mark.parametrize(
    ("origin", "path", "status"),
    [
        ("https://shop.example", "/v2/models/fused/infer", 200),
        ("https://shop.example", "/classify", 200),
        ("https://shop.example", "/gradio_api/queue/join", 403),
        ("https://other.example", "/v2/models/fused/infer", 403),
        ("http://shop.example", "/classify", 403),
    ],
)
def test_a_page_elsewhere_may_call_what_it_was_allowed(
    origin: str, path: str, status: int, statuses_behind: StatusesBehind
) -> None:
    headers = [(b"host", b"localhost"), (b"origin", origin.encode())]
    scope = {"type": "http", "path": path, "headers": headers}
    guard = partial(HostAndOrigin, hosts=["localhost"], origins=["https://shop.example"])
    assert statuses_behind(guard, scope) == [status]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--root-path", "/a?b"], "--root-path '/a?b' is no path"),
        (["--root-path", "https://x/app"], "is no path"),
        (["--trust-proxy", "nginx"], "--trust-proxy 'nginx' is no address"),
        (["--allow-origin", "shop.example"], "is no origin"),
        (["--allow-origin", "https://shop.example/page"], "is no origin"),
    ],
)
def test_a_flag_that_cannot_be_meant_is_one_sentence(flags: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("?", r"\?")):
        parse_arguments(["bundle", *flags])


def test_flags_become_settings() -> None:
    flags = ["--root-path", "app/", "--trust-proxy", "10.0.0.7", "--allow-origin", "https://Shop.example/"]
    settings = parse_arguments(["bundle", *flags])
    assert settings.root_path == "/app"
    assert settings.trusted_proxies == ("10.0.0.7",)
    assert settings.allowed_origins == ("https://shop.example",)
