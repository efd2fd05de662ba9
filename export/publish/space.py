"""Bundles -> a Hugging Face Space, in one of two forms. It runs as it is, there or here.

static: the page of ffl_deploy.web, which classifies in the visitor's browser; every account can have one.
gradio: the demo, its requirements, the bundles, the card. It carries the source of `ffl_deploy` and `serve`,
so it depends on no published version of this project.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import UsageError
from ffl_deploy.files import replace_folder, write_atomically
from ffl_deploy.installed import install_command
from ffl_deploy.web.build import WebOptions, is_page, keep_others, own_names, web_models, write_page

PACKAGES = ("ffl_deploy", "serve")
OWN = {*PACKAGES, "bundles", "app.py", "requirements.txt", "README.md"}
EXTRAS = ("predict", "serve", "cpu")
Sdk = Literal["static", "gradio"]
SETTINGS: dict[Sdk, tuple[str, ...]] = {
    # With these headers the platform isolates the page, and WebAssembly may use several threads.
    "static": (
        "app_file: index.html",
        "custom_headers:",
        "  cross-origin-embedder-policy: require-corp",
        "  cross-origin-opener-policy: same-origin",
        "  cross-origin-resource-policy: cross-origin",
    ),
    "gradio": ("app_file: app.py", 'python_version: "3.11"'),
}

APP = '''"""The demo of this Space; the platform gives the address, `python app.py` serves this machine."""

import os
import sys
from pathlib import Path

from ffl_deploy.command import run_command
from serve.demo.__main__ import main

bundles = [str(folder.parent) for folder in sorted(Path(__file__).parent.glob("bundles/*/bundle.json"))]
address = "0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1"
port = os.environ.get("PORT", "7860")
# the platform's own proxy is the only one who connects
hosts = ["--allow-host", "*"] if os.environ.get("SPACE_ID") else []
sys.exit(run_command(main, [*bundles, "--host", address, "--port", port, *hosts, *sys.argv[1:]]))
'''


def write_space(
    bundles: Sequence[Bundle],
    folder: Path,
    sdk: Sdk = "static",
    options: WebOptions | None = None,
    variants: Sequence[str | None] = (None,),
) -> None:
    """Write the Space into `folder`, which keeps what is not part of it: git's files, a licence, pictures.

    Args: sdk: which of the two forms; the other one's files go. options, variants: of the static page.
    Raises UsageError where `folder` holds something that is no Space.
    """
    require_space(folder)
    with replace_folder(folder) as new:
        keep_others(folder, new, OWN | own_names())
        if sdk == "static":
            models = web_models([str(bundle.folder) for bundle in bundles], variants)
            write_page(models, new, options)
        else:
            _write_demo(bundles, new)
        write_atomically(new / "README.md", card(bundles, sdk))


def _write_demo(bundles: Sequence[Bundle], folder: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(_source(package), folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for bundle in bundles:
        shutil.copytree(bundle.folder, folder / "bundles" / bundle.name)
    write_atomically(folder / "app.py", APP)
    write_atomically(folder / "requirements.txt", "".join(f"{line}\n" for line in requirements()))


def require_space(folder: Path) -> None:
    """Raises UsageError unless `folder` is new, empty, a Space that was written here,
    or the clone of a new one."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"--space {folder} is a file; give a new folder.")
    own = [path.name for path in folder.iterdir() if not path.name.startswith(".git")]
    app, readme = folder / "app.py", folder / "README.md"
    if own == [readme.name] and re.match(
        r"---\n.*^sdk:.*^---", readme.read_text(errors="replace"), re.S | re.M
    ):
        return  # the platform writes a card into a new Space
    is_demo = (
        (folder / "bundles").is_dir()
        and app.is_file()
        and app.read_bytes().startswith(APP.splitlines()[0].encode())
    )
    if own and not is_demo and not is_page(folder):
        raise UsageError(
            f"--space {folder} is not empty and holds no Space that was written here; give a new folder."
        )


def _source(package: str) -> Path:
    """-> the folder of an installed package, found without importing it (export
    and serve do not know each other)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"--space needs the package {package}; install ffl-deploy completely: {install_command('all')}."
        )
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


def card(bundles: Sequence[Bundle], sdk: Sdk) -> str:
    """-> README.md: the Space's settings as YAML, then the bundles' own cards."""
    title = f"{' and '.join(bundle.name for bundle in bundles)} on {bundles[0].manifest.source.data}"
    lines = ["---", f"title: {title}", f"sdk: {sdk}", *SETTINGS[sdk], "pinned: false", "---", ""]
    cards = [(bundle.folder / "README.md").read_text() for bundle in bundles]
    return "\n".join(lines) + "\n" + "\n".join(cards)
