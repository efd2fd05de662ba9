"""Ray Serve: the same /v2 application in many replicas, with autoscaling,
a bounded queue and rolling updates.

    serve run serve.cluster:app bundles=bundles/fused,bundles/branch0 replicas=2

A replica counts as healthy once its bundles are loaded and verified, so a rolling update to a new bundle (run
the command again with another folder) moves traffic only to replicas that answer. Each replica micro-batches
for itself. The demo is not served here: its sessions belong to one process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ffl_deploy.bundle import load_bundle
from ffl_deploy.bundle_files import AUTO
from ffl_deploy.runtime import runtime_named
from serve.server.limits import ANY_HOST
from serve.server.offline import SILENCE
from serve.server.settings import Limits, ModelSpec, Settings, listed_bundles

os.environ.update(SILENCE)  # before Ray is imported; its workers inherit it

import msgspec
from ray import serve as ray_serve
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message

from serve.app import create_app
from serve.server.service import Phase


class Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `serve run serve.cluster:app name=value ...` takes; every value arrives as text."""

    bundles: str  # [NAME=]BUNDLE,...
    variant: str | None = None
    replicas: int | None = None  # a fixed number; else between min_replicas and max_replicas
    min_replicas: int = 2  # with one, a rolling update stops it before its successor is ready
    max_replicas: int = 4
    runtime: str | None = None  # default: the one that the variant was verified with
    gpus: float | None = (
        None  # of one replica, such as 0.5; default: 1 where the runtime computes on a GPU, else 0
    )
    threads: int = 1  # cores of one replica
    ongoing: int = 64  # requests that one replica works on
    queued: int = 256  # requests that wait for a replica; more get 503


@dataclass(frozen=True)
class Captured:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


@ray_serve.deployment(health_check_period_s=5, graceful_shutdown_timeout_s=30)
class Bundles:
    """One replica: a process with its own sessions, batchers and metrics."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, bundles: Sequence[str], variant: str | None, runtime: str | None, threads: int
    ) -> None:
        models = tuple(ModelSpec.parse(text, variant) for text in bundles)
        # The cluster's proxy is the only one who connects; it bounds the queue and sets the Host.
        settings = Settings(
            models,
            host="0.0.0.0",
            allowed_hosts=(ANY_HOST,),
            demo=False,
            runtime=runtime,
            workers=1,
            threads=threads,
            limits=Limits(),
        )
        self._app = create_app(settings)
        self._service = self._app.state.service
        await self._service.load_models()
        self._service.become(Phase.READY)

    def check_health(self) -> None:
        """Ray replaces a replica whose health check raises."""
        if not self._service.ready:
            raise RuntimeError(f"the service is {self._service.phase.value}")

    async def __call__(self, request: Request) -> Response:
        """Any request, answered by the application."""
        captured = await _capture(self._app, request)
        response = Response(captured.body, captured.status)
        response.raw_headers = captured.headers
        return response


async def _capture(app: ASGIApp, request: Request) -> Captured:
    status, headers, pieces = 500, [], []

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message["headers"])
        elif message["type"] == "http.response.body":
            pieces.append(message.get("body", b""))

    await app(dict(request.scope), request.receive, send)
    return Captured(status, headers, b"".join(pieces))


def app(arguments: dict[str, str]) -> ray_serve.Application:
    """-> the application for `serve run`. Raises msgspec.ValidationError for arguments that do not exist."""
    given = msgspec.convert(arguments, Arguments, strict=False)
    scaling: dict[str, Any] = {"num_replicas": given.replicas}
    if given.replicas is None:
        bounds = {"min_replicas": given.min_replicas, "max_replicas": given.max_replicas}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": max(1, given.ongoing // 2)}}
    folders = listed_bundles(given.bundles)
    deployment = Bundles.options(  # type: ignore[attr-defined]  # the decorator makes it a Deployment
        **scaling,
        max_ongoing_requests=given.ongoing,
        max_queued_requests=given.queued,
        ray_actor_options={"num_cpus": given.threads, "num_gpus": gpus_of_replica(given, folders)},
    )
    return deployment.bind(folders, given.variant, given.runtime, given.threads)


def gpus_of_replica(given: Arguments, bundles: Sequence[str]) -> float:
    """-> what Ray is asked for, so that a replica is started where there is a GPU, and sees no other.

    Raises UsageError for an unknown runtime or variant.
    """
    if given.gpus is not None:
        return given.gpus
    specs = [ModelSpec.parse(text, given.variant) for text in bundles]
    variants = [spec for spec in specs if spec.variant != AUTO]
    runtimes = (
        [given.runtime]
        if given.runtime
        else [load_bundle(spec.folder).variant(spec.variant).runtime for spec in variants]
    )
    return float(any(runtime_named(name).gpu for name in runtimes))
