"""Which model to ship: what the manifests say, and the exporter's report where it lies beside the bundles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffl_deploy.bundle import Bundle, Variant
from serve.models import ServedModel

COLUMNS = ("model", "variant", "accuracy", "of images", "ms per image", "images/s", "MB", "precision", "parity")


@dataclass(frozen=True)
class Report:
    """What the exporter wrote for a folder of bundles; either part may be missing."""

    folder: Path
    text: str | None  # report.md
    picture: Path | None  # report.png


def table(models: Iterable[ServedModel]) -> list[list[str]]:
    """-> one row for each variant of each served bundle, under COLUMNS; what was not measured is a dash."""
    return [_row(model.name, model.bundle, variant) for model in models for variant in model.bundle.manifest.variants]


def reports(models: Iterable[ServedModel]) -> list[Report]:
    """-> the reports beside the served bundles, each folder once."""
    folders = sorted({model.bundle.folder.parent for model in models})
    found = []
    for folder in folders:
        text, picture = folder / "report.md", folder / "report.png"
        if text.is_file() or picture.is_file():
            content = text.read_text(encoding="utf-8") if text.is_file() else None
            found.append(Report(folder, content, picture if picture.is_file() else None))
    return found


def card(bundle: Bundle) -> str:
    """-> the bundle's model card, its README.md."""
    path = bundle.folder / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else "This bundle has no model card."


def _row(name: str, bundle: Bundle, variant: Variant) -> list[str]:
    accuracy, latency = variant.accuracy or {}, variant.latency or {}
    parity = (variant.parity or {}).get("verdict", {}).get("status")
    rates = latency.get("images_per_second") or {}
    return [
        name,
        variant.name,
        _number(accuracy.get("value"), "{:.2%}"),
        _number(accuracy.get("n"), "{:,}"),
        _number(latency.get("p50_ms"), "{:.2f}"),
        _number(max(rates.values(), default=None), "{:,.0f}"),
        f"{variant.bytes / 1e6:.2f}",
        f"{variant.precision.stored} / {variant.precision.computed}",
        parity or "–",
    ]


def _number(value: Any, text: str) -> str:
    return "–" if value is None else text.format(value)
