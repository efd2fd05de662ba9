"""Which model to ship: the exporter's report where it lies beside the bundles,
else what the manifests say."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from ffl_deploy.bundle import Bundle
from ffl_deploy.images import ImageError, decode
from ffl_deploy.manifest import Variant
from ffl_deploy.report import PICTURE, REPORT, Artefact, Report
from serve.server.logs import LOGGER
from serve.server.models import ServedModel

MOST_REPORT_BYTES, MOST_PICTURE_BYTES, MOST_PICTURE_PIXELS = 16 << 20, 16 << 20, 20_000_000
COLUMNS = (
    "model",
    "variant",
    "accuracy",
    "of images",
    "ms per image",
    "images/s",
    "MB",
    "precision",
    "parity",
)
REPORT_COLUMNS = (
    "model / variant", "served as", "accuracy", "95 % interval", "noise", "p50 / p95 ms", "images/s (batch)",
    "MB", "gates",
)  # fmt: skip


@dataclass(frozen=True)
class ShownReport:
    """An export's report, for people. `rows` stand under REPORT_COLUMNS; `picture`: its Pareto plot,
    where there is one."""

    folder: Path
    advice: str
    machine: str
    rows: list[list[str]]
    picture: Path | None
    recommended: int | None = None  # of the rows


def reports(models: Iterable[ServedModel]) -> list[ShownReport]:
    """-> the reports beside the served bundles, each folder once;
    one that cannot be read is logged and left out."""
    served: dict[Path, list[ServedModel]] = {}
    for model in models:
        served.setdefault(model.bundle.folder.parent, []).append(model)
    found = []
    for folder, inside in served.items():
        file = read_report(folder / REPORT)
        if file is not None:
            picture = folder / PICTURE
            in_order = sorted(file.rows, key=lambda row: (not row.measured, -(row.accuracy or 0)))
            names, advice = [row.name for row in in_order], file.recommendation
            rows = [_report_row(row, inside, advice.undecided) for row in in_order]
            found.append(
                ShownReport(
                    folder,
                    file.recommendation.reason,
                    file.machine,
                    rows,
                    picture if picture.is_file() and not picture.is_symlink() else None,
                    names.index(advice.artefact) if advice.artefact in names else None,
                )
            )
    return found


def read_report(path: Path) -> Report | None:
    """-> the report, or None where there is none or not a valid one: the demo goes on without it."""
    try:
        return msgspec.json.decode(read_regular(path, MOST_REPORT_BYTES), type=Report)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        _left_out(path, error)
        return None


def read_regular(path: Path, most: int) -> bytes:
    """-> the file's bytes. What lies beside a bundle came with it: a link there could lead to any file of
    this machine, and a device or a pipe never ends. Raises OSError for these, and for more than `most`
    bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise OSError(errno.EINVAL, f"not a plain file of at most {most} bytes", str(path))
        return file.read(most)


def write_picture(picture: Path, target: Path) -> bool:
    """Write the report's picture, decoded and encoded again, as the PNG `target`; -> whether it is one."""
    try:
        pixels = decode(read_regular(picture, MOST_PICTURE_BYTES), MOST_PICTURE_PIXELS, apart=False).pixels
    except FileNotFoundError:
        return False
    except (OSError, ImageError) as error:
        _left_out(picture, error)
        return False
    Image.fromarray(pixels).save(target)
    return True


def _left_out(path: Path, error: Exception) -> None:
    logging.getLogger(LOGGER).warning(
        "export report left out", extra={"file": str(path), "reason": str(error)}
    )


def table(models: Iterable[ServedModel]) -> list[list[str]]:
    """-> one row for each variant of each served bundle, under COLUMNS; what was not measured is a dash."""
    return [
        _row(model.name, model.bundle, variant)
        for model in models
        for variant in model.bundle.manifest.variants
    ]


def card(bundle: Bundle) -> str:
    """-> the bundle's model card, its README.md."""
    path = bundle.folder / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else "This bundle has no model card."


def _report_row(row: Artefact, models: Iterable[ServedModel], undecided: Sequence[str]) -> list[str]:
    served = [
        model.name
        for model in models
        if (model.bundle.manifest.target, model.variant.name) == (row.target, row.variant)
    ]
    low, high = row.accuracy_low, row.accuracy_high
    return [
        f"{row.target} / {row.variant}",
        ", ".join(served),
        _number(row.accuracy, "{:.2%}"),
        "" if low is None or high is None else f"{100 * low:.2f} to {high:.2%}",
        "level with the best" if row.name in undecided else "",
        "–" if row.p50_ms is None else f"{row.p50_ms:.2f} / {_number(row.p95_ms, '{:.2f}')}",
        _number(row.images_per_second, "{:,.0f}")
        + ("" if row.best_batch is None else f" ({row.best_batch})"),
        f"{row.bytes / 1e6:.2f}",
        _gates(row),
    ]


def _gates(row: Artefact) -> str:
    """-> what the gates said of a file, in one word where they agree."""
    parity, accuracy = row.parity, row.accuracy_gate
    return parity if parity == accuracy else f"logits {parity}, accuracy {accuracy}"


def _row(name: str, bundle: Bundle, variant: Variant) -> list[str]:
    accuracy, latency, parity = variant.accuracy, variant.latency, variant.parity
    return [
        name,
        variant.name,
        _number(accuracy and accuracy.value, "{:.2%}"),
        _number(accuracy and accuracy.n, "{:,}"),
        _number(latency and latency.p50_ms, "{:.2f}"),
        _number(latency and max(latency.images_per_second.values(), default=None), "{:,.0f}"),
        f"{variant.bytes / 1e6:.2f}",
        f"{variant.precision.stored} / {variant.precision.computed}",
        parity.verdict.status if parity else "–",
    ]


def _number(value: Any, text: str) -> str:
    return "–" if value is None else text.format(value)
