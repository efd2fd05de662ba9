"""The tests that only a GPU can decide."""

from __future__ import annotations

import importlib.util
import sys
from xml.etree import ElementTree

from benchmarks.gpu_acceptance.report import Context, NotHere
from benchmarks.gpu_acceptance.training import run as start


def run(context: Context) -> None:
    context.need_gpu()
    if importlib.util.find_spec("pytest") is None:
        raise NotHere("needs pytest")
    result = context.out / "gpu-tests.xml"
    # tests/serve imports packages that a bare machine has not got
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/train",
        "tests/export",
        f"--junitxml={result}",
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "5"]
    done = start([*command, "-p", "no:cacheprovider"])
    (context.out / "gpu-tests.txt").write_text(done.stdout + done.stderr)
    context.report.note(code=done.returncode, said=done.stdout.strip().splitlines()[-1:])
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(result).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[kind].append(f"{case.get('classname')}.{case.get('name')}")
    context.report.note(
        passed=len(outcomes["passed"]), failed=outcomes["failed"], skipped=outcomes["skipped"]
    )
    context.report.must("tests ran", bool(outcomes["passed"]))
    context.report.must("none failed", not outcomes["failed"] and done.returncode == 0)
    others = [
        name for name in outcomes["skipped"] if "rtx" not in name.lower() and "tensorrt" not in name.lower()
    ]
    context.report.must("none was skipped but TensorRT's", not others)
