"""What a server is started with. Every limit of the service is decided here."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from ffl_deploy.errors import UsageError
from ffl_deploy.images import MAX_PIXELS

MIB = 1024 * 1024
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


@dataclass(frozen=True)
class Limits:
    """Bounds that keep one client, or many, from taking the machine. Beyond them: 413, 408, 429 or 503,
    never a longer queue."""

    body_bytes: int = 32 * MIB  # of one request to /v2 or /classify
    demo_json_bytes: int = MIB  # of one JSON request to the demo; files go through its upload route
    upload_bytes: int = 256 * MIB  # of one upload to the demo: a zip of photos
    upload_folder_bytes: int = 2048 * MIB  # of all uploads that are kept
    bytes_in_flight: int = 512 * MIB  # of all bodies that are being read or answered
    body_seconds: float = 600.0  # until a request's body has arrived
    body_pause_seconds: float = 20.0  # for 16 KiB of it
    share_of_address: float = 0.5  # of bytes_in_flight
    pixels: int = MAX_PIXELS  # of one image, by its header
    request_pixels: int = 8 * MAX_PIXELS  # of the images of one request, together
    images_per_request: int = 64
    queued_images: int = 1024  # that wait for one model
    queued_decodes: int = 256  # image files that wait for a decoder
    demo_queue: int = 64  # demo actions that wait
    # open pages and API calls of which Gradio keeps a state; more than can wait or run
    demo_sessions: int = 128
    message_bytes: int = 16 * MIB  # of one message of gRPC, which is not seen before it is complete
    streams: int = 64  # of gRPC, that clients hold open
    stream_pause_seconds: float = 75.0  # until the next request of one
    connections: int = 1000  # beyond them those that wait are closed, the longest first
    silent_connections: int = 100  # of one address, that have never sent a request
    header_bytes: int = 64 * 1024  # of one request, its address included
    header_seconds: float = 20.0  # until they have arrived
    batch_images: int = 10_000  # of one batch in the demo


@dataclass(frozen=True)
class ModelSpec:
    """`name` is what clients say; `folder` holds the bundle."""

    name: str
    folder: Path
    variant: str | None = None

    @staticmethod
    def parse(text: str, variant: str | None = None) -> ModelSpec:
        """`NAME=BUNDLE` or `BUNDLE` -> ModelSpec. A folder that exists is one, even with `=` in its path.
        Raises UsageError."""
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            name, folder = Path(text).resolve().name, text
        if not name or not NAME_CHARACTERS.issuperset(name):
            raise UsageError(
                f"{name!r} cannot be a model's name in a URL; give one of letters, digits and -_. as in "
                f"cats={folder}"
            )
        return ModelSpec(name, Path(folder), variant)


def listed_bundles(text: str) -> list[str]:
    """`A,NAME=B` -> one text for each bundle, with an absolute path, for processes that work in another
    folder. A comma or an equals sign inside the path of a folder that exists is part of it."""
    pieces, found, start = text.split(","), list[str](), 0
    while start < len(pieces):
        joined = [",".join(pieces[start:end]) for end in range(len(pieces), start, -1)]
        chosen = next((one for one in joined if _folder_of(one)), pieces[start])
        start += chosen.count(",") + 1
        name, equals, folder = chosen.partition("=")
        whole = not equals or Path(chosen).exists()
        found.append(os.path.abspath(chosen) if whole else f"{name}={os.path.abspath(folder)}")
    return found


def _folder_of(text: str) -> bool:
    name, equals, folder = text.partition("=")
    return Path(text).exists() or (
        bool(equals) and NAME_CHARACTERS.issuperset(name) and Path(folder).exists()
    )


@dataclass(frozen=True)
class Settings:
    """A server, completely described."""

    models: tuple[ModelSpec, ...]
    host: str = "127.0.0.1"
    port: int = 7860
    grpc_port: int | None = None  # 0: any; the address is that of the HTTP port
    protocol: bool = True  # serve /v2 and /classify
    demo: bool = True  # serve the Gradio demo at /
    title: str | None = None  # of the demo's page
    runtime: str | None = None
    threads: int | None = None  # of one run; None shares the cores among the workers
    workers: int | None = None  # runs of one model at a time, at most one for each core; None: 2, on a GPU 1
    gpu: int | None = None  # of this machine, for a runtime on one; None: the first
    max_batch: int = 32  # images in one run of a model
    model_control: bool = False  # clients may load and unload models
    watch_seconds: float | None = None  # between two looks whether a bundle was replaced on disk
    sets: str | None = None  # the level whose sets and abstention go with every answer
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None  # where it came from
    public_key: Path | None = None  # bundles that are not signed by its owner are refused
    allowed_hosts: tuple[str, ...] = ()  # further Host names, behind a proxy or in a cluster
    allowed_origins: tuple[str, ...] = ()  # pages elsewhere that may call /v2 and /classify
    root_path: str = ""  # the prefix under which a proxy shows the server, such as /app
    trusted_proxies: tuple[str, ...] = ()  # whose X-Forwarded-* is believed
    drain_seconds: float = 1.0  # between "not ready" and closing the port
    shutdown_seconds: float = 30.0  # for requests in flight
    access_log: bool = False
    log_format: str = "json"
    otlp: str | None = None  # the address of a collector of traces; None: none are made
    limits: Limits = Limits()
