"""`make quickstart`: every command a first user needs, run for real, and a table of what came out.

A second call goes on where the first was stopped and repeats nothing that is finished,
except export and prediction.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

from ffl_deploy.bundle import load_bundle
from ffl_deploy.errors import INTERRUPTED
from ffl_deploy.run_directory import CONFIG, SUMMARY

RUN, BUNDLES = Path("runs/quickstart"), Path("bundles/quickstart")
IMAGES = RUN / "test_images"
TARGETS = ("fused", "branch0")


def main() -> int:
    """-> 0, or the exit code of the first command that failed."""
    interrupted = (RUN / CONFIG).is_file() and not (RUN / SUMMARY).is_file()
    train = "" if (RUN / SUMMARY).is_file() else f"ffl-train {'--resume' if interrupted else '--out'} {RUN}"
    commands = [
        train,
        f"ffl-export {RUN} {' '.join(f'--target {target}' for target in TARGETS)} --out {BUNDLES}",
        f"ffl-export --report-only --out {BUNDLES}",
        f"ffl-verify {' '.join(str(BUNDLES / target) for target in TARGETS)}",
        f"python -m train.write_images {IMAGES}",
        *(f"ffl-predict {BUNDLES / target} {IMAGES} --out {RUN / target}.jsonl" for target in TARGETS),
    ]
    for command in filter(None, commands):
        print(f"\n$ {command}", flush=True)
        program, *arguments = shlex.split(command)
        code = run([str(Path(sys.executable).parent / program), *arguments])
        if code:
            if code == INTERRUPTED:
                print("\nstopped; make quickstart goes on from here", file=sys.stderr)
            return code
    print(f"\n{table()}")
    environment = Path(sys.prefix)
    shown = environment.relative_to(Path.cwd()) if environment.is_relative_to(Path.cwd()) else environment
    print(
        f"\nThe bundles are in {BUNDLES}/, what to ship in {BUNDLES}/report.md; a machine without torch "
        "needs only those (docs/install.md)."
    )
    print(f"Now these commands are there to be typed, after:\n\n    . {shown}/bin/activate\n")
    return 0


def run(command: list[str]) -> int:
    """-> its exit code. Ctrl-C reaches the command too, which saves what it has and ends by itself."""
    child = subprocess.Popen(command)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


def table() -> str:
    """-> one row per bundle, from its manifest and from the predictions on the test images."""
    columns = (
        "target",
        "parameters",
        "file",
        "PyTorch acc.",
        "ONNX acc.",
        "predicted acc.",
        "top-1 agreement",
        "latency, batch 1",
    )
    rows = [columns]
    for target in TARGETS:
        bundle = load_bundle(BUNDLES / target)
        variant = bundle.variant()
        accuracy, latency = variant.accuracy, variant.latency
        if accuracy is None or latency is None:
            # ffl-export measures every one on its CPU
            raise ValueError(f"{target}: its fp32 variant was not measured")
        rows.append(
            (
                target,
                f"{bundle.manifest.source.parameters:,}",
                f"{variant.bytes / 1e6:.2f} MB",
                f"{100 * accuracy.difference.reference_accuracy:.2f} %",
                f"{100 * accuracy.value:.2f} %",
                f"{100 * predicted_accuracy(RUN / f'{target}.jsonl'):.2f} %",
                f"{100 * accuracy.top1_agreement:.1f} %",
                f"{latency.p50_ms:.2f} ms",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def predicted_accuracy(file: Path) -> float:
    """-> share of rows whose label is the name of the folder that the image lies in."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sum(Path(row["path"]).parent.name == row["label"] for row in rows) / len(rows)


if __name__ == "__main__":
    sys.exit(main())
