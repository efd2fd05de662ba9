"""What all console commands share: a help text that is there at once, and one sentence about wrong flags."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from ffl_deploy.command import run_command
from ffl_deploy.version import __version__
from serve.predict.command import build_parser
from tests.parsing import accepts

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "ffl-train": "train.run",
    "ffl-export": "export.cli",
    "ffl-verify": "ffl_deploy.verify",
    "ffl-engine": "ffl_deploy.engine",
    "ffl-predict": "serve.predict.command",
    "ffl-web": "ffl_deploy.web.command",
    "ffl-serve": "serve.command",
}
TOOLS = (
    "train.compare", "train.import_official", "train.branch_weights", "train.write_images",
    "serve.demo.__main__",
)  # fmt: skip
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


def help_of(module: str) -> str:
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=True, env={**os.environ, "COLUMNS": "200"}
    )
    return done.stdout


@pytest.mark.parametrize("module", [*COMMANDS.values(), *TOOLS])
def test_every_help_has_a_version_and_two_examples_that_parse(module: str) -> None:
    """The examples are typed into the very parser that prints them: a flag that has gone fails here."""
    text = help_of(module)
    assert "--version" in text
    program = next(line.split()[1:] for line in text.splitlines() if line.startswith("usage: "))
    examples = [line.split() for line in text.partition("\nexamples:\n")[2].splitlines()]
    assert len(examples) >= 2
    for words in examples:
        length = 3 if words[0] == "python" else 1
        assert words[:length] == program[:length]
        assert accepts(module, words[length:])


@pytest.mark.parametrize("module", [*COMMANDS.values(), *TOOLS])
def test_the_version_is_the_package_s(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        import_module(module).main(["--version"])
    assert ended.value.code in (None, 0)
    assert capsys.readouterr().out.startswith(f"ffl-deploy {__version__}, Python 3.")


@pytest.mark.parametrize(
    ("module", "typed", "said"),
    [
        ("serve.predict.command", "b x --topk 3", "Did you mean --top-k?"),
        ("serve.predict.command", "--topk 3", "Did you mean --top-k?"),  # before what is missing
        ("serve.predict.command", "b x --format json", "Did you mean 'jsonl'?"),
        ("serve.command", "b --prot 1", "Did you mean --port?"),
        ("serve.command", "b --port abc", "'abc' is not a whole number"),
        ("serve.command", "b --runtime openvno", "Did you mean 'openvino'?"),
        ("ffl_deploy.verify", "b --varient x", "Did you mean --variant?"),
        ("ffl_deploy.web.command", "b --ot x", "Did you mean --out?"),
        ("export.cli", "--presision int8", "Did you mean --precision?"),
        ("export.cli", "--precision int4", "Did you mean 'int8'?"),
        ("serve.predict.command", "b", "INPUT is missing; for example: ffl-predict examples/cifar100/fused "),
        ("serve.predict.command", "", "BUNDLE, INPUT are missing; for example: ffl-predict "),
        (
            "serve.predict.command",
            "LICENSE examples/cifar100/fused",
            "is a file and not a bundle; give the folder",
        ),
        (
            "serve.predict.command",
            "examples/cifar100/fuse LICENSE",
            "Did you mean 'examples/cifar100/fused'?",
        ),
        (
            "serve.predict.command",
            "examples/cifar100/fused LICENSE --out p.xlsx",
            "end it in one of .parquet, .jsonl, .csv, or give --format",
        ),
        ("ffl_deploy.verify", "LICENSE", "is a file and not a bundle; give the folder"),
        ("train.run", "--epoch 3", "Did you mean --epochs?"),
        ("train.run", "--method fll", "Did you mean 'ffl'?"),
        ("train.run", "--epochs three", "'three' is not a whole number"),
        ("train.run", "tests", "Did you mean --data tests?"),
        ("train.compare", "--seeds 3 --metods ffl", "Did you mean --methods?"),
        ("train.branch_weights", "r --branche 1 --out x", "Did you mean --branch?"),
        ("serve.demo.__main__", "b --no-demo", "unrecognized arguments: --no-demo"),
    ],
)
def test_what_was_mistyped_is_told_with_what_was_meant(
    module: str, typed: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert run_command(import_module(module).main, typed.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert "Did you mean 'LICENSE'" not in error


def test_underscores_are_dashes_everywhere() -> None:
    assert build_parser().parse_args(["b", "x", "--top_k", "3"]).top_k == 3


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
    """Processor time of the process, least of five: hardly longer where other work shares the machine."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, cwd=ROOT, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5
