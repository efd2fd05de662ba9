"""`--part I/N`: N machines each make a part of one run, and `ffl-predict merge` puts the parts together.

Part I holds every N-th shard from the I-th on. Shards are cut by position, so the parts are disjoint whatever
machine makes them, and together they have the bytes of a run that was never divided.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from serve.inputs.items import Item


class Part(NamedTuple):
    """Which shards of a run are made here: of every `of` shards the `number`-th, counted from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def owns(self, shard: int) -> bool:
        return shard % self.of == self.number - 1

    def next_from(self, shard: int) -> int:
        """-> the first shard of this part that is `shard` or comes behind it."""
        return shard + (self.number - 1 - shard) % self.of

    def items_of(self, total: int, shard_size: int) -> int:
        """-> how many of `total` items this part has."""
        whole, rest = divmod(total, shard_size)
        mine = len(range(self.number - 1, whole, self.of)) * shard_size
        return mine + (rest if self.owns(whole) else 0)


WHOLE = Part(1, 1)


def part_given(text: str) -> Part:
    """-> the value of --part; as a `type` of argparse."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, as in 2/3")
    return Part(int(found[1]), int(found[2]))


class Listing:
    """Takes in all inputs as they pass, those of other parts too: names and labels, which are the same on
    every machine that was given the same list (times of files are not)."""

    def __init__(self) -> None:
        self._hash, self.items = hashlib.sha256(), 0

    def passing(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            self._hash.update("\0".join((item.path, item.label or "", "")).encode())
            self.items += 1
            yield item

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()
