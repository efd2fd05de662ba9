"""The results of a GPU as a page: docs/performance/gpu.json -> docs/gpu-acceptance.md.

    python -m benchmarks.gpu_acceptance.page [--add] [OUT ...]

With OUT, the folder of a run, its acceptance.json becomes docs/performance/gpu.json first; of several, in the
order in which they were made, every stage is that of the last run that had it; with --add, of those
of before too. What was not measured is said
not to be: no number stands on the page that is not in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_acceptance.runner import not_run
from benchmarks.gpu_acceptance.stages import STAGES
from ffl_deploy.command import run_command
from ffl_deploy.errors import UsageError
from ffl_deploy.files import write_atomically
from ffl_deploy.markdown import fill, table

RESULTS, PAGE = Path("docs/performance/gpu.json"), Path("docs/gpu-acceptance.md")
NOTHING = "**Not measured yet**: no machine with a GPU was at hand."


def summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """-> the table of a run: a row per stage."""
    rows = []
    for line in lines:
        told = "; ".join([*([line["why"]] if line.get("why") else []), *line["left_out"]])
        rows.append([line["stage"], line["status"], f"{line['seconds']:.0f}", cell(told)])
    return table(["stage", "result", "seconds", "why, and what was left out"], rows)


def page(content: Mapping[str, Any] | None) -> str:
    """content: of acceptance.json, None where nothing was measured."""
    rows = [[stage.name, f"{stage.limit} s", stage.does, stage.must_hold] for stage in STAGES]
    stages = table(["stage", "at most", "does", "must hold"], rows)
    results = NOTHING if content is None else results_of(content)
    return fill(Path(__file__).with_name("page.md"), stages=stages, results=results)


def results_of(content: Mapping[str, Any]) -> str:
    """-> the table of the run, and what every stage found."""
    runs = content.get("runs", 1)
    pieces = "" if runs == 1 else f", in {runs} runs: of every stage the last one"
    parts = [f"{content['date']}, {content['machine']['gpu']}{pieces}", summary(content["stages"])]
    for line in content["stages"]:
        checks = [
            f"- {'holds' if holds else '**does not hold**'}: {cell(text)}"
            for text, holds in line["checks"].items()
        ]
        numbers = [f"- {cell(name)}: {cell(shown(value))}" for name, value in line["found"].items()]
        parts += [f"### {line['stage']}", "\n".join([*checks, *numbers]) or "Not measured."]
    return "\n\n".join(parts)


def shown(value: Any) -> str:
    """-> a found value as text."""
    if value is None:
        return "not measured"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def stored() -> dict[str, Any] | None:
    """-> what docs/performance/gpu.json holds."""
    content: dict[str, Any] | None = json.loads(RESULTS.read_text())
    return content


def result_of(folder: Path) -> dict[str, Any]:
    """-> acceptance.json of the run in `folder`. Raises UsageError."""
    source = folder / "acceptance.json"
    if not source.is_file():
        raise UsageError(f"there is no {source}; run benchmarks.gpu_acceptance --out {folder} first.")
    content: dict[str, Any] = json.loads(source.read_text())
    if "gpu" not in content["machine"]:
        raise UsageError(f"{source} is of a machine without a GPU; the page is about GPUs.")
    return content


def joined(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """-> one result of several runs, the earliest first. Raises UsageError for runs of different GPUs."""
    gpus = sorted({run["machine"]["gpu"] for run in runs})
    if len(gpus) > 1:
        raise UsageError(f"these runs are of different GPUs ({', '.join(gpus)}); give those of one.")
    last: dict[str, Any] = {}
    for line in (line for run in runs for line in run["stages"]):
        if line["status"] != "not run" or line["stage"] not in last:
            last[line["stage"]] = line
    stages = [last.get(stage.name) or not_run(stage, "was in none of these runs") for stage in STAGES]
    count = sum(run.get("runs", 1) for run in runs)  # what is stored can be of several
    return {"date": runs[-1]["date"], "runs": count, "machine": runs[-1]["machine"], "stages": stages}


def main(argv: Sequence[str]) -> int:
    """-> exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_acceptance.page", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("out", type=Path, nargs="*", metavar="OUT")
    parser.add_argument("--add", action="store_true", help="to what is stored of the same GPU")
    arguments = parser.parse_args(argv)
    if arguments.out:
        before = [kept for kept in [stored() if arguments.add else None] if kept is not None]
        content = joined(before + [result_of(folder) for folder in arguments.out])
        write_atomically(RESULTS, json.dumps(content, indent=1) + "\n")
    write_atomically(PAGE, page(stored()))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
