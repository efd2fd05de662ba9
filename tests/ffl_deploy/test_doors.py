"""Console scripts find this project's packages beside files of the user's that have the same names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
START = "import sys; import ffl_deploy.doors as doors; sys.argv[0] = 'ffl'; getattr(doors, sys.argv.pop(1))()"


@pytest.mark.parametrize("kind", ["files", "packages"])
@pytest.mark.parametrize("command", ["train", "export", "predict", "serve", "verify", "web"])
def test_own_files_called_train_and_serve_do_not_hide_the_packages(
    command: str, kind: str, tmp_path: Path
) -> None:
    for name in ("train", "export", "serve"):
        if kind == "packages":
            (tmp_path / name).mkdir()
        own = tmp_path / (f"{name}/__init__.py" if kind == "packages" else f"{name}.py")
        own.write_text("raise SystemExit('the wrong one')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", START, command, "--help"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: ffl-{command}" in done.stdout


def test_nothing_is_moved_where_nothing_hides_them() -> None:
    code = (
        "import sys; before = list(sys.path); import ffl_deploy.doors as doors; doors.put_stages_first(); "
        "print(before == sys.path)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "True\n"
