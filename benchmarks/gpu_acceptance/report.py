"""What one stage finds, kept on disk as it is found: a stage that is ended at its limit leaves what it
had."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffl_deploy.files import write_atomically


class NotHere(Exception):
    """This machine lacks what the stage needs; the text says what."""


@dataclass
class Report:
    """found: numbers and texts; checks: what must hold, and whether it does; left_out: what could not run.
    Parts of a stage may run in threads."""

    path: Path
    found: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def note(self, **found: Any) -> None:
        with self.lock:
            self.found |= found
            self.save()

    def must(self, text: str, holds: bool) -> None:
        """Something that must hold; the stage goes on either way."""
        with self.lock:
            self.checks[text] = bool(holds) and self.checks.get(text, True)
            self.save()

    def leave_out(self, text: str) -> None:
        """A part that this machine cannot run, and why."""
        with self.lock:
            self.left_out.append(text)
            self.save()

    def save(self) -> None:
        content = {"found": self.found, "checks": self.checks, "left_out": self.left_out}
        write_atomically(self.path, json.dumps(content) + "\n")


@dataclass(frozen=True)
class Context:
    """What every stage is given. device: "cuda" or "cpu"; data: the kit's images; official: its clone of the
    official code; work: what stages leave for later ones; ends: when the stage is ended, on the monotonic
    clock."""

    out: Path
    device: str
    data: Path | None
    official: Path | None
    report: Report
    ends: float = float("inf")

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def size(self, epochs: int, on_cpu: int = 1) -> list[str]:
        """-> the flags of a run on the digits, which a CPU has to end within its limit too."""
        if self.gpu:
            return ["--epochs", str(epochs)]
        return ["--epochs", str(on_cpu), "--branches", "resnet8,resnet8"]

    def need_gpu(self) -> None:
        if not self.gpu:
            raise NotHere("needs an NVIDIA GPU")

    def need_official(self) -> Path:
        if self.official is None:
            raise NotHere("needs the official code (--official CLONE)")
        return self.official
