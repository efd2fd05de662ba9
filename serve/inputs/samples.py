"""WebDataset's samples: members of a tar that stand together and have one name up to its first dot. What is
`.cls` or `.json` of them says what the image is.

Source: https://github.com/webdataset/webdataset#the-webdataset-format
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from serve.inputs.items import Item, Skipped, label_text

LABELS = (".cls", ".json")
KEYS = ("label", "cls", "class", "class_name", "label_name")  # of a sample's JSON, tried in this order
MAX_LABEL_BYTES = 64 * 1024


def is_label(name: str) -> bool:
    return name.lower().endswith(LABELS)


class Sample:
    """The members that were met last and belong together. An image waits in memory for what follows it: its
    label may."""

    def __init__(self) -> None:
        self._key = ""
        self._items: list[Item] = []
        self._labels: dict[str, str | None] = {}  # suffix -> what it says

    def image(self, name: str, item: Item, skipped: Skipped) -> Iterator[Item]:
        """Add an image; yields what is complete."""
        yield from self._at(name, skipped)
        self._items.append(item.loaded()._replace(bound=True))

    def labelled(self, name: str, content: bytes, skipped: Skipped) -> Iterator[Item]:
        """Add a label; yields what is complete."""
        yield from self._at(name, skipped)
        suffix = "." + name.rpartition(".")[2].lower()
        text = content.decode(errors="replace") if suffix == ".cls" else None
        self._labels[suffix] = label_text(text) if suffix == ".cls" else _of_json(content)

    def ended(self, skipped: Skipped) -> Iterator[Item]:
        """Yield what is left."""
        found = (self._labels.get(suffix) for suffix in LABELS)
        label = next((one for one in found if one is not None), None)
        for item in self._items:
            yield item._replace(label=label or item.label)
        if self._labels and not self._items:
            skipped.reasons["labels without an image"] += len(self._labels)
        self._items, self._labels = [], {}

    def _at(self, name: str, skipped: Skipped) -> Iterator[Item]:
        folder, slash, base = name.rpartition("/")
        key = folder + slash + base.partition(".")[0]
        if key != self._key:
            yield from self.ended(skipped)
            self._key = key


def _of_json(content: bytes) -> str | None:
    try:
        said = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        for key in KEYS:
            if key in said:
                return label_text(msgspec.json.decode(said[key], type=str | int))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return None
