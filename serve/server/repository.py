"""Which of its bundles a server holds: they are loaded, unloaded, and replaced where they changed on disk.

New files answer from the moment on at which they have passed everything that a server asks of a bundle before
it is ready. Until then, and for as long as they do not, those before them do.

Source: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md
"""

from __future__ import annotations

import asyncio
import contextlib
import os

from ffl_deploy.bundle import load_bundle
from ffl_deploy.errors import FflError, UsageError
from ffl_deploy.files import entries, existing_folder
from serve.server.protocol import VERSION
from serve.server.service import Phase, Service
from serve.server.settings import ModelSpec

Stamp = frozenset[tuple[str, int, int, int]]
"""(name, bytes, time, inode) of every file of a bundle: whether it has to be looked at again."""


class Repository:
    """The bundles that the server was started with; it never opens any other folder. One change at a time."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._specs = {spec.name: spec for spec in service.settings.models}
        self._changing = asyncio.Lock()
        self._unloaded: set[str] = set()
        self._refused: dict[str, str] = {}  # why what lies on disk does not answer
        self._tried: dict[str, Stamp] = {}  # the files that were tried last, whatever came of it
        self._seen: dict[str, Stamp] = {}  # at the last look

    def index(self, ready_alone: bool = False) -> list[dict[str, str]]:
        """-> the answer to POST /v2/repository/index."""
        found = []
        for name in self._specs:
            entry = {"name": name, "version": VERSION, "state": self._state(name)}
            if why := self._refused.get(name, "unloaded" if name in self._unloaded else ""):
                entry["reason"] = why
            found.append(entry)
        return [entry for entry in found if entry["state"] == "READY" or not ready_alone]

    def _state(self, name: str) -> str:
        if name in self.service.models:
            return "READY"
        return "UNAVAILABLE" if name in self._unloaded else "LOADING"

    async def load(self, name: str) -> None:
        """Load or replace a model from its folder. Raises UsageError, CheckError, OSError: what answered
        before does so still."""
        spec = self._spec(name)
        async with self._changing:
            await self._load(spec)
            self._unloaded.discard(name)

    async def unload(self, name: str) -> None:
        """Let a model answer nothing more. Raises UsageError for an unknown name."""
        self._spec(name)
        async with self._changing:
            if name in self.service.models:
                self._unloaded.add(name)
                self.service.unload_model(name)

    async def look(self, settled: bool = False) -> None:
        """Replace each loaded model whose files are not those that were tried last; a bundle that is refused
        is logged, once. settled: only where nothing has changed since the last look, as a copy that is still
        being made has."""
        for name, spec in self._specs.items():
            if name not in self.service.models or self.service.phase is not Phase.READY:
                continue
            stamp = await asyncio.to_thread(stamp_of, spec)
            changing = self._seen.get(name) != stamp
            self._seen[name] = stamp
            if changing and settled:
                continue
            if self._tried.get(name) == stamp:
                continue
            async with self._changing:
                if await asyncio.to_thread(_is_served, spec, self.service.models[name].bundle.sha256):
                    self._tried[name] = stamp
                    self._refused.pop(name, None)
                    continue
                with contextlib.suppress(FflError, OSError):
                    await self._load(spec)

    async def watch(self, seconds: float) -> None:
        """Look every so many seconds, for ever."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.look(settled=True)
            except Exception:  # a fault of ours must not end the looking
                self.service.log.exception("looking for replaced bundles failed")

    async def _load(self, spec: ModelSpec) -> None:
        self._tried[spec.name] = await asyncio.to_thread(stamp_of, spec)
        try:
            await self.service.load_model(spec)
        except (FflError, OSError) as error:
            self._refused[spec.name] = str(error)
            self.service.log.error(
                "the bundle on disk is refused"
                + ("; the one before it answers on" if spec.name in self.service.models else ""),
                extra={"model": spec.name, "folder": str(spec.folder), "reason": str(error)},
            )
            raise
        self._refused.pop(spec.name, None)

    def _spec(self, name: str) -> ModelSpec:
        if name not in self._specs:
            raise UsageError(
                f"there is no bundle of that name; this server was started with {', '.join(self._specs)}."
            )
        return self._specs[name]


def stamp_of(spec: ModelSpec) -> Stamp:
    """-> what is known of a bundle's files without reading them; empty while there are none."""
    folder, found = existing_folder(spec.folder), set()
    for name in entries(folder) if folder else ():
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(folder / name)  # type: ignore[operator]
            found.add((name, status.st_size, status.st_mtime_ns, status.st_ino))
    return frozenset(found)


def _is_served(spec: ModelSpec, sha256: str) -> bool:
    """-> whether the folder's manifest is that of the model which answers."""
    try:
        return load_bundle(spec.folder).sha256 == sha256
    except (FflError, OSError):
        return False
