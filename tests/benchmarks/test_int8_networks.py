"""benchmarks.int8_networks: a training stops at its limit, and the row is what the two files answer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.int8_networks import CLASSES, Row, as_table, limited, linked
from ffl_deploy.errors import CheckError, UsageError

BUSY = "import signal, sys\nsignal.signal(signal.SIGINT, lambda *_: sys.exit(130))\nwhile True: pass"


def test_a_training_is_asked_to_stop_when_its_processor_time_is_used_up() -> None:
    assert limited([sys.executable, "-c", BUSY], minutes=0.005) == 130
    assert limited([sys.executable, "-c", "pass"], minutes=None) == 0
    with pytest.raises(CheckError, match="exit code 7"):
        limited([sys.executable, "-c", "import sys; sys.exit(7)"], minutes=None)


def test_the_ten_classes_are_linked_once_and_a_missing_one_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in CLASSES:
            (tmp_path / "data" / split / name).mkdir(parents=True)
    for _ in range(2):
        folder = linked(tmp_path / "data", CLASSES, tmp_path / "work" / "images")
    assert sorted(path.name for path in (folder / "test").iterdir()) == sorted(CLASSES)
    (tmp_path / "data" / "test" / CLASSES[3]).rmdir()
    with pytest.raises(UsageError, match=f"no folder {CLASSES[3]}"):
        linked(tmp_path / "data", CLASSES, tmp_path / "other")


def test_a_row_counts_the_convolutions_that_stay_in_float() -> None:
    row = Row("net", 1000, 0.5, 0.49, 0.98, 0.001, "percentile", 40, ["node_conv2d_3", "node_conv2d_7"])
    assert as_table([row]).splitlines()[2].endswith("| 98.0 % | 0.00100 | percentile | 2 of 40 |")
