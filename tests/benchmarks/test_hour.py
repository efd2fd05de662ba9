"""The clock of the comparison of an hour: whose speed counts, and which epoch was complete when."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.hour import official_rate, reached, table


def one(minutes: list[float], fused: list[float], hits: int) -> dict[str, object]:
    validation = [{"fused": value, "ensemble": value, "branch0": value} for value in fused]
    test = {"fused": hits, "ensemble": hits, "branch0": hits - 10, "branch1": hits - 20}
    return {"minutes": minutes, "validation": validation, "test": test, "test_images": 1000}


def test_the_official_rate_is_the_median_of_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    path.write_text(
        json.dumps(
            {"batch": 128, "blocks": {"official": [{"seconds": s} for s in (0.5, 0.64, 9.0)], "ours": []}}
        )
    )
    assert np.isclose(official_rate(path), 200)


def test_an_epoch_counts_when_it_is_complete() -> None:
    run = one([9.9, 10.1, 60.0], [0.1, 0.2, 0.3], 300)
    assert [reached(run, minute) for minute in (5, 10, 11, 60)] == [None, 0.1, 0.2, 0.3]


def test_the_table_has_both_runs() -> None:
    text = table({"fast": one([30, 59.6], [0.5, 0.7], 700), "official": one([20, 55], [0.3, 0.6], 600)})
    assert "| fast | 2 | 60 | **70.00** (67.09 to 72.76) | 70.00 | 69.00 and 68.00 |" in text
    assert "| official |  | 30.0 | 30.0 | 30.0 | 30.0 | 60.0 |" in text
