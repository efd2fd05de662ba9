"""The tests that only a GPU can decide."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from xml.etree import ElementTree

from benchmarks.gpu_acceptance.report import Context, NotHere
from benchmarks.gpu_acceptance.training import ROOT, pythonpath


def run(context: Context) -> None:
    context.need_gpu()
    if importlib.util.find_spec("pytest") is None:
        raise NotHere("needs pytest")
    result = context.out / "gpu-tests.xml"
    # tests/serve imports packages that a bare machine has not got
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "tests/train", "tests/export"]
    command += [f"--junitxml={result}", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "6"]
    with open(context.out / "gpu-tests.txt", "w") as said:  # as it comes: what is over its limit leaves it
        environment = {**os.environ, "PYTHONPATH": pythonpath()}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=said, stderr=said, check=False)
    context.report.note(code=done.returncode)
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
