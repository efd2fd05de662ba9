"""What ffl-predict was asked to do, and what an engine works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ffl_deploy.bundle import Bundle
from serve.predict.parts import WHOLE, Part
from serve.predict.progress import Display, Progress
from serve.predict.shards import ShardsFolder
from serve.predict.summary import Totals
from serve.predict.supervise import Recovery


@dataclass(frozen=True)
class Job:
    """What ffl-predict was asked to do; the fields are its flags. None: decide by the bundle,
    the file name or a measurement."""

    bundle: str
    inputs: list[str]
    out: Path
    format: str | None = None
    variant: str | None = None
    runtime: str | None = None
    top_k: int = 5
    columns: list[str] = field(default_factory=list)  # of rows.OPTIONAL_COLUMNS
    sets: str | None = None  # the level whose sets and abstention are written
    column: str | None = None
    label_column: str | None = None
    follow_links: bool = False
    batch_size: int | None = None
    threads: int | None = None
    shard_size: int | None = None
    resume: bool = False
    part: Part | None = None  # None: the whole run
    engine: Literal["local", "ray"] = "local"
    public_key: Path | None = None  # of whoever has to have signed the bundle
    gpu: int | Literal["all"] | None = None  # None: the first, where the runtime computes on one
    display: Display = "screen"
    quiet: bool = False  # no remarks on standard error
    recovery: Recovery = field(default_factory=Recovery)

    @property
    def own(self) -> Part:
        """-> the shards that are made here."""
        return self.part or WHOLE


@dataclass(frozen=True)
class PredictRun:
    """What an engine works with: the request, the model, where shards go, and what to keep count with."""

    job: Job
    bundle: Bundle
    shards: ShardsFolder
    totals: Totals
    progress: Progress
