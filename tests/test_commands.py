"""What all console commands share: a help text that is there at once, and one sentence about wrong flags."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from ffl_deploy.command import run_command

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "ffl-train": "train.run",
    "ffl-export": "export.cli",
    "ffl-verify": "ffl_deploy.verify",
    "ffl-predict": "serve.predict.command",
    "ffl-web": "ffl_deploy.web.command",
    "ffl-serve": "serve.command",
}
# Each takes longer to import than a help text may.
HEAVY = (
    "torch", "torchvision", "timm", "onnx", "onnxruntime", "openvino", "sklearn", "scipy", "matplotlib",
    "pyarrow", "fastapi", "uvicorn", "gradio", "ray",
)  # fmt: skip
LOADED_BY_HELP = f"""
import importlib, sys
from ffl_deploy.command import run_command
try:
    run_command(importlib.import_module(sys.argv[1]).main, ["--help"])
except SystemExit as stopped:
    print(stopped.code, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("module", COMMANDS.values(), ids=COMMANDS)
def test_help_needs_nothing_heavy(module: str) -> None:
    command = [sys.executable, "-c", LOADED_BY_HELP, module]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr.splitlines() == ["0 []"]
    assert "usage: " in done.stdout


def test_a_manifest_is_read_without_an_image_library() -> None:
    look = (
        "import sys; from ffl_deploy import load_bundle; print(load_bundle(sys.argv[1]).manifest.target);"
        "sys.exit('PIL' in sys.modules)"
    )
    bundle = ROOT / "examples/cifar100/branch0"
    done = subprocess.run([sys.executable, "-c", look, bundle], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "branch0", "")


@pytest.mark.parametrize(
    "module",
    ["train.run", "export.cli", "ffl_deploy.verify", "ffl_deploy.web.command", "serve.predict.command"],
)
@pytest.mark.parametrize(
    "arguments", [["--no-such-flag"], ["x", "x", "--variant"], ["x", "--precision", "fp33", "--top-k", "0"]]
)
def test_a_flag_that_does_not_exist_is_one_sentence(
    module: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(import_module(module).main, arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--help" in error


@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS.values(), ids=COMMANDS)
def test_help_takes_half_a_second(module: str) -> None:
    """Wall time of the process, best of five: what the machine can do when nothing else runs."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, cwd=ROOT, check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5
