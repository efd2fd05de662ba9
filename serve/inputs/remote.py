"""Images at addresses: `s3://`, `gs://`, `https://`, through fsspec. Only what the command line names is
fetched; an address in a table, a list or an archive is not, nor is any for the server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from ffl_deploy.errors import UsageError, first_line
from ffl_deploy.images import SUFFIXES, ImageError
from ffl_deploy.installed import require
from serve.inputs.items import MAX_FILE_BYTES, Item, Skipped, label_of

SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}
"""Scheme -> the package that fsspec needs for it."""
VERSIONS = ("ETag", "etag", "LastModified", "mtime", "updated", "md5Hash", "size")
"""What a store says of an object that changes with its content, as far as each has it."""


def is_address(argument: str) -> bool:
    return "://" in argument and not os.path.lexists(argument)


def check(argument: str) -> None:
    """Raise UsageError where an address cannot be read: another scheme, a missing package, nothing there."""
    scheme = argument.partition("://")[0]
    if scheme not in SCHEMES:
        raise UsageError(
            f"{argument}: addresses are {', '.join(f'{one}://' for one in SCHEMES)}; download it."
        )
    for module in ("fsspec", SCHEMES[scheme]):
        require(module, "or download the images first")
    _listed(argument)


def items(argument: str, classes: frozenset[str], skipped: Skipped) -> Iterator[Item]:
    """Yield the images at an address: the one object, those that a pattern matches, or those below a prefix,
    names sorted. Each is fetched when it is its turn. Raises UsageError."""
    files, found, whole = _listed(argument)
    for name in sorted(found):
        if not whole and not name.lower().endswith(SUFFIXES):
            skipped.reasons["files without an image suffix"] += 1
            continue
        address = files.unstrip_protocol(name)
        said = found[name]
        version = " ".join(f"{key} {said[key]}" for key in VERSIONS if said.get(key) is not None)
        label = None if whole else label_of(name.split("/")[:-1], classes)
        yield Item(address, partial(_fetched, files, name), label, version=version)


def count(argument: str) -> int:
    """-> how many images there are."""
    return sum(1 for _ in items(argument, frozenset(), Skipped()))


def _listed(argument: str) -> tuple[Any, dict[str, dict[str, Any]], bool]:
    """-> (the file system, name -> what it says of it, whether that is the one object of the address)."""
    import fsspec

    scheme = argument.partition("://")[0]
    try:
        files, path = fsspec.core.url_to_fs(argument)
        if not scheme.startswith("http"):
            if any(character in path for character in "*?["):
                return files, files.glob(path, detail=True), False
            if files.isdir(path):
                return files, files.find(path, detail=True), False
        return files, {path: files.info(path)}, True
    except Exception as error:  # each store has errors of its own
        raise UsageError(
            f"{argument} cannot be read ({_words(error)}); check the address and who may read it."
        ) from error


def _fetched(files: Any, name: str) -> bytes:
    try:
        with files.open(name, "rb", cache_type="none") as file:
            data: bytes = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise ImageError("missing", "there is nothing at this address") from error
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError("unreadable", f"it cannot be fetched ({_words(error)})") from error
    if len(data) > MAX_FILE_BYTES:
        raise ImageError("too_large", f"it has more than {MAX_FILE_BYTES} bytes")
    return data


def _words(error: Exception) -> str:
    return first_line(error)[:200]
