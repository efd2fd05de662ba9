"""Lists of images: what their columns are usually called, and how their text is opened.

One answer for training and ffl-predict, so that the list that a network was trained from can be predicted and
scored as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

# tried in this order
IMAGE_COLUMNS = ("path", "image", "file_name", "image_path", "filename", "file")
LABEL_COLUMNS = ("label", "class", "target")
LONGEST_LINE = 2**20


def open_text(table: str | Path) -> TextIO:
    """-> a CSV or TSV file; names that are not UTF-8 stay openable."""
    return open(table, newline="", encoding="utf-8-sig", errors="surrogateescape")
