"""Latencies of several bundles' files, in turn."""

from __future__ import annotations

import pytest

from benchmarks.latency import cells, main
from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import UsageError
from ffl_deploy.manifest import LatencyRecord


def test_the_medians_over_the_rounds_are_shown() -> None:
    def record(p50: float, *speeds: float) -> LatencyRecord:
        by_batch = dict(zip(("1", "16", "64"), speeds, strict=True))
        return LatencyRecord(p50, 2 * p50, by_batch, 64, 1, "a processor")

    rounds = [record(2.0, 500, 900, 1000), record(9.0, 100, 200, 4000), record(3.04, 330, 800, 1234.5)]
    assert cells(rounds) == ["3.0", "330", "800", "1,234"]


def test_every_file_that_there_is_gets_a_row(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--rounds", "1", "--seconds", "0.001", "--threads", "1"]
    assert main([str(tiny_bundle.folder), "--variants", "fp32,bf16", *quick]) == 0
    *_, row, _, where = capsys.readouterr().out.splitlines()
    assert row.startswith(f"| {tiny_bundle.folder} | {tiny_bundle.preprocessing.width} | fp32 | ")
    assert where.startswith("1 threads of ")
    with pytest.raises(UsageError, match="none of these bundles has a variant of bf16"):
        main([str(tiny_bundle.folder), "--variants", "bf16", *quick])
