"""The console scripts: each finds its stage among this project's own packages, and runs it.

`train`, `export` and `serve` are names that other people's files have too. A `serve.py` in a folder on
PYTHONPATH (`PYTHONPATH=.`, or /app in a container) would be imported in the package's place; here the
package comes first.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib import import_module

from ffl_deploy.command import run_command
from ffl_deploy.installed import SOURCE

STAGES = ("train", "export", "serve")


def put_stages_first() -> None:
    """Move the folder that holds ffl_deploy in front of whatever hides one of its neighbours.

    On `sys.path`, which child processes inherit, and only where something does hide one: the order stays as
    it is for everybody else.
    """
    for stage in STAGES:
        found = importlib.util.find_spec(stage)
        if found is None or found.origin is None or not (SOURCE / stage).is_dir():
            continue
        hiding = os.path.dirname(found.origin)
        if os.path.basename(found.origin) == "__init__.py":
            hiding = os.path.dirname(hiding)
        if os.path.realpath(hiding) == str(SOURCE):
            continue
        places = [os.path.realpath(entry) for entry in sys.path]
        place = os.path.realpath(hiding)
        sys.path.insert(places.index(place) if place in places else 0, str(SOURCE))


def _run(module: str) -> None:
    put_stages_first()

    def load(argv: object) -> int:
        import_module(module)
        return 0

    code = run_command(load)  # a package that is missing is a sentence here too
    if code:
        sys.exit(code)
    import_module(module).entry()


def train() -> None:
    """`ffl-train`."""
    _run("train.run")


def export() -> None:
    """`ffl-export`."""
    _run("export.cli")


def verify() -> None:
    """`ffl-verify`."""
    _run("ffl_deploy.verify")


def engine() -> None:
    """`ffl-engine`."""
    _run("ffl_deploy.engine")


def predict() -> None:
    """`ffl-predict`."""
    _run("serve.predict.command")


def web() -> None:
    """`ffl-web`."""
    _run("ffl_deploy.web.command")


def serve() -> None:
    """`ffl-serve`."""
    _run("serve.command")
