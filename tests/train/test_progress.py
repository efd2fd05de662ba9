"""What training shows while it runs: a line an epoch that stays, and on a terminal a bar of known length."""

from __future__ import annotations

import io
import sys

import pytest

from train.record import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LINE = {"epoch": 0, "loss": 1.5, "validation": {"fused": 0.25, "branch0": 0.5}, "images_per_second": 99.6}
EPOCH = "epoch 1/3  loss 1.500  val % fused 25.0 branch0 50.0  100 img/s"


@pytest.mark.parametrize("terminal", [True, False])
def test_each_epoch_leaves_a_line(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress(0, quiet=False)
    for step in range(1, 5):
        progress.show(0, 12, step, 60 * step - step % 2, 1.5, 3)
    progress.epoch(LINE, 3)
    progress.close()
    assert EPOCH in screen.getvalue()
    assert ("%|" in screen.getvalue()) == terminal


def test_the_bar_s_length_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images first, a short step at each epoch's end: the share of the steps is what is left."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(1000, quiet=False)  # resumed
    totals = []
    for step, images in ((5, 1064), (6, 1128), (7, 1140)):
        progress.show(1, 12, step, images, 1.5, 3)
        totals.append((progress.bar.total, progress.bar.n))
    progress.close()
    assert totals == [(12, 5), (12, 6), (12, 7)]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(0, quiet=True)
    progress.show(0, 12, 1, 60, 1.5, 3)
    progress.epoch(LINE, 3)
    progress.close()
    assert capsys.readouterr() == ("", "")
