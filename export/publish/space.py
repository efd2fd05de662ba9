"""Bundles -> a Hugging Face Space: the demo, its requirements, the bundles, the card. It runs as it is, there or here.

The Space carries the source of `ffl_deploy` and `serve`, so it depends on no published version of this project.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import UsageError
from ffl_deploy.files import replace_folder, write_atomically

PACKAGES = ("ffl_deploy", "serve")
OWN = {*PACKAGES, "bundles", "app.py", "requirements.txt", "README.md"}
EXTRAS = ("predict", "serve", "cpu")

APP = '''"""The demo of this Space; the platform gives the address, a plain `python app.py` serves this machine only."""

import os
import sys
from pathlib import Path

from ffl_deploy.command import run_command
from serve.demo.__main__ import main

bundles = [str(folder.parent) for folder in sorted(Path(__file__).parent.glob("bundles/*/bundle.json"))]
address = "0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1"
sys.exit(run_command(main, [*bundles, "--host", address, "--port", os.environ.get("PORT", "7860"), *sys.argv[1:]]))
'''


def write_space(bundles: Sequence[Bundle], folder: Path) -> None:
    """Write the Space into `folder`, which keeps what is not part of it: git's files, a licence, pictures.

    Raises UsageError where `folder` holds something that is no Space.
    """
    require_space(folder)
    with replace_folder(folder) as new:
        for kept in folder.iterdir() if folder.is_dir() else ():
            if kept.name not in OWN:
                (shutil.copytree(kept, new / kept.name, symlinks=True) if kept.is_dir() else shutil.copy2(kept, new))
        for package in PACKAGES:
            shutil.copytree(_source(package), new / package, ignore=shutil.ignore_patterns("__pycache__"))
        for bundle in bundles:
            shutil.copytree(bundle.folder, new / "bundles" / bundle.name)
        write_atomically(new / "app.py", APP)
        write_atomically(new / "requirements.txt", "".join(f"{line}\n" for line in requirements()))
        write_atomically(new / "README.md", card(bundles))


def require_space(folder: Path) -> None:
    """Raises UsageError unless `folder` is new, empty, a Space that was written here, or the clone of a new one."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"--space {folder} is a file; give a new folder.")
    own = [path.name for path in folder.iterdir() if not path.name.startswith(".git")]
    app, readme = folder / "app.py", folder / "README.md"
    if own == [readme.name] and re.match(r"---\n.*^sdk:.*^---", readme.read_text(errors="replace"), re.S | re.M):
        return  # the platform writes a card into a new Space
    is_space = (folder / "bundles").is_dir() and app.is_file() and app.read_bytes().startswith(APP.splitlines()[0].encode())
    if own and not is_space:
        raise UsageError(f"--space {folder} is not empty and holds no Space that was written here; give a new folder.")


def _source(package: str) -> Path:
    """-> the folder of an installed package, found without importing it (export and serve do not know each other)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"--space needs the package {package}; install ffl-deploy completely: pip install 'ffl-deploy[all]'.")
    return Path(next(iter(spec.submodule_search_locations)))


def requirements() -> list[str]:
    """-> the requirements of prediction and demo on a CPU, as this project's own metadata states them."""
    lines = importlib.metadata.requires("ffl-deploy") or []
    kept = []
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        extra = re.fullmatch(r"extra == ['\"](.+)['\"]", marker)
        if (not marker or (extra and extra[1] in EXTRAS)) and not requirement.startswith("ffl-deploy"):
            kept.append(requirement)
    return sorted(set(kept))


def card(bundles: Sequence[Bundle]) -> str:
    """-> README.md: the Space's settings as YAML, then the bundles' own cards."""
    title = f"{' and '.join(bundle.name for bundle in bundles)} on {bundles[0].manifest.source.data}"
    lines = ["---", f"title: {title}", "sdk: gradio", "app_file: app.py", 'python_version: "3.11"', "pinned: false", "---", ""]
    cards = [(bundle.folder / "README.md").read_text() for bundle in bundles]
    return "\n".join(lines) + "\n" + "\n".join(cards)
