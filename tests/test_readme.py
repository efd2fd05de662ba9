"""What people paste: the commands of README and docs parse, and the README's blocks work as they stand."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.page.drawing import ALTERNATIVE, drawing
from tests.parsing import accepts

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "examples/cifar100/README.md"])
MODULES = {
    "ffl-train": "train.run",
    "ffl-export": "export.cli",
    "ffl-verify": "ffl_deploy.verify",
    "ffl-predict": "serve.predict.command",
    "ffl-web": "ffl_deploy.web.command",
    "ffl-serve": "serve.command",
}
OUTPUT = re.compile(r"ffl-\w+: |(ffl-\w+|python -m \S+)$")  # an error that is shown; a name alone


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (module, arguments) of each command of ours in a code block of `page`."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    blocks = re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```|^((?:    .*\n)+)", text, re.S | re.M)
    for line in "".join(fenced or indented for fenced, indented in blocks).splitlines():
        for part in re.split(r"&&|\|\||;", line):
            words = re.sub(r"^\s*(\$ )?", "", part)
            if OUTPUT.match(words.strip()):
                continue
            with contextlib.suppress(ValueError):  # prose with an apostrophe
                typed = shlex.split(words, comments=True)
                end = next((n for n, word in enumerate(typed) if word in ("|", ">", "&", "<")), None)
                typed = typed[:end]
                if typed and typed[0] in MODULES:
                    yield MODULES[typed[0]], typed[1:]
                elif typed[:2] == ["python", "-m"] and typed[2].startswith(("train.", "serve.")):
                    yield typed[2], typed[3:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_parses(page: Path) -> None:
    for module, arguments in commands(page):
        if "..." in arguments:
            continue  # a form, not a command
        name = f"{module}.__main__" if module == "serve.demo" else module
        assert accepts(name, arguments), f"{page.name}: {module} {arguments}"


def test_commands_are_found() -> None:
    found = [command for page in PAGES for command in commands(page)]
    assert {module for module, _ in found} >= set(MODULES.values())
    assert len(found) > 60


def bash_blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


def test_blocks_hold_commands_alone() -> None:
    """The copy button copies a block whole: no prompt, no output, no placeholder, no remark."""
    blocks = bash_blocks()
    assert len(blocks) == 5
    for line in "".join(blocks).splitlines():
        assert re.match(r"(make|\.|ffl-\w+|python -m) ", line), line
        assert "<" not in line
        assert "#" not in line
        assert line != line.upper()


def test_the_drawing_is_what_the_script_draws() -> None:
    assert (ROOT / "docs/ffl.svg").read_text() == drawing()
    assert ALTERNATIVE in (ROOT / "README.md").read_text()


def test_the_table_of_results_is_the_report_s() -> None:
    import msgspec

    from ffl_deploy.markdown import megabytes, percent
    from ffl_deploy.report import Report

    stored = (ROOT / "examples/cifar100/report.json").read_bytes()
    text = (ROOT / "README.md").read_text()
    for row in msgspec.json.decode(stored, type=Report).rows:
        if row.target in ("fused", "branch0") and row.variant in ("fp32", "int8"):
            name = f"{row.target.replace('branch0', 'branch 0')}, {row.variant}"
            line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
            assert percent(row.accuracy) in line
            assert f"{row.parameters:,}" in line
            assert f"{megabytes(row.bytes)} MB" in line


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_blocks_work_as_they_are_pasted(tmp_path: Path) -> None:
    """In a fresh clone, as a user with an empty home, one shell for all of them; the server runs until it is
    asked something, and then ends as Ctrl-C ends it."""
    clone, home = tmp_path / "ffl-deploy", tmp_path / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    environment = {
        "HOME": str(home),
        "PATH": f"{Path(sys.base_prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        **kept,
    }
    *before, serving = bash_blocks()
    install, serve = serving.splitlines()
    script = "".join(before) + install + "\n"
    shell = ["bash", "-e", "-c"]
    done = subprocess.run(
        [*shell, script], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (clone / "predictions.csv").is_file()
    assert "recommended" in (clone / "bundles/photos/report.md").read_text()
    python = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)[1]
    said = subprocess.run(
        [clone / ".venv/bin/python", "-c", python], cwd=clone, capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("clock ")

    activated = ". .venv/bin/activate\nexec " + serve
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen([*shell, activated], cwd=clone, env=environment, stderr=log)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if urllib.request.urlopen("http://127.0.0.1:7860/v2/health/ready", timeout=5).status == 200:
                    break
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            time.sleep(0.5)
        page = urllib.request.urlopen("http://127.0.0.1:7860/", timeout=60).read()
        assert b"<html" in page
    finally:
        server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0
