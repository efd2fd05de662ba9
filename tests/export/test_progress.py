"""What export says while it works: lines that stay on standard output, a bar on a terminal alone."""

from __future__ import annotations

import io
import sys

import pytest

from export.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_stay_and_the_bar_names_the_step(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress()
    progress.expect(4)
    progress.step("fused: tracing the graph")
    progress.finished()
    progress.line("bundles/fused: fp32")
    progress.close()
    assert capsys.readouterr().out == "bundles/fused: fp32\n"
    assert ("fused: tracing the graph" in screen.getvalue()) == terminal
    assert ("1 of 4 files" in screen.getvalue()) == terminal
