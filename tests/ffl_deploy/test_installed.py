"""A package that is missing: which extra brings it, told as this installation can get it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from ffl_deploy import installed
from ffl_deploy.command import run_command
from ffl_deploy.errors import UsageError
from ffl_deploy.installed import PACKAGES, install_command, missing, missing_import

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# module -> distribution, where the names differ
DISTRIBUTIONS = {
    "PIL": "pillow", "google": "protobuf", "cuda": "cuda-bindings", "onnx_ir": "onnx-ir",
    "pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin",
    "model_signing": "model-signing", "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart", "mlflow": "mlflow-skinny", "tensorrt": "tensorrt-cu13",
    "tensorrt_rtx": "tensorrt-rtx-cu13", "grpc": "grpcio",
    "opentelemetry": "opentelemetry-exporter-otlp-proto-http",
}  # fmt: skip


def brought(extra: str) -> set[str]:
    """-> the distributions that an extra of pyproject.toml names, and those of the extras in it."""
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    names: set[str] = set()
    for line in lines:
        name, inner = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", line).groups()
        names |= set().union(*map(brought, inner.split(","))) if name == "ffl-deploy" else {name}
    return names


@pytest.mark.parametrize("module", PACKAGES)
def test_the_extra_that_is_named_brings_the_package(module: str) -> None:
    assert DISTRIBUTIONS.get(module, module) in brought(PACKAGES[module].extra)


def test_every_package_of_the_extras_has_a_sentence() -> None:
    tools = {re.match(r"[\w.-]+", line)[0] for line in PROJECT["optional-dependencies"]["dev"]}
    not_imported = {"protobuf", "onnxruntime-gpu", "tensorrt-cu12", "tensorrt-cu13", "pyopenssl"}
    known = {DISTRIBUTIONS.get(module, module) for module in PACKAGES}
    for extra in PROJECT["optional-dependencies"]:
        assert brought(extra) - tools - not_imported <= known, extra


class Recorded:
    """A distribution with the record that pip leaves of where it came from (PEP 610)."""

    def __init__(self, record: object) -> None:
        self.text = None if record is None else json.dumps(record)

    def read_text(self, name: str) -> str | None:
        return self.text if name == "direct_url.json" else None


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (None, "install 'ffl-deploy[serve]'"),
        ({"url": "file:///c/my%20ffl", "dir_info": {"editable": True}}, "install -e '/c/my ffl[serve]'"),
        ({"url": "file:///clones/ffl", "dir_info": {}}, "install '/clones/ffl[serve]'"),
        (
            {"url": "file:///d/ffl_deploy-0.1.0-py3-none-any.whl", "archive_info": {}},
            "install '/d/ffl_deploy-0.1.0-py3-none-any.whl[serve]'",
        ),
        (
            {"url": "https://example.org/ffl.whl", "archive_info": {}},
            "install 'ffl-deploy[serve] @ https://example.org/ffl.whl'",
        ),
        (
            {"url": "https://example.org/ffl", "vcs_info": {"vcs": "git", "commit_id": "ab12"}},
            "install 'ffl-deploy[serve] @ git+https://example.org/ffl@ab12'",
        ),
        (
            {
                "url": "https://example.org/ffl",
                "vcs_info": {"vcs": "git", "commit_id": "ab12", "requested_revision": "v1"},
            },
            "install 'ffl-deploy[serve] @ git+https://example.org/ffl@v1'",
        ),
    ],
)  # fmt: skip
def test_the_command_fits_how_the_package_was_installed(
    record: object, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Recorded(record))
    assert install_command("serve").endswith(f" {expected}")


def test_run_from_a_folder_that_was_never_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(name: str) -> object:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", none)
    monkeypatch.chdir(ROOT)
    assert install_command("cpu").endswith(" install -e '.[cpu]'")
    monkeypatch.chdir(tmp_path)
    assert install_command("cpu").endswith(f" install -e '{ROOT}[cpu]'")


def test_pip_is_that_of_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    own = str(Path(sys.executable).with_name("pip"))
    monkeypatch.setattr(installed.shutil, "which", lambda name: own)
    assert install_command("cpu").startswith("pip install ")
    monkeypatch.setattr(installed.shutil, "which", lambda name: "/usr/bin/pip")
    assert install_command("cpu").startswith(f"{sys.executable} -m pip install ")


def test_an_import_that_fails_inside_a_command_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: object) -> int:
        raise ModuleNotFoundError("No module named 'uvicorn.config'", name="uvicorn.config")

    assert run_command(main, []) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "uvicorn is not installed; run: " in error
    assert "[serve]" in error


def test_an_import_of_ours_that_fails_stays_a_traceback() -> None:
    """It is a fault of the program, and says nothing about what is installed."""

    def main(argv: object) -> int:
        raise ModuleNotFoundError("No module named 'serve.nothing'", name="serve.nothing")

    assert missing_import(ModuleNotFoundError("x", name="serve.nothing")) is None
    with pytest.raises(ModuleNotFoundError):
        run_command(main, [])


def test_what_else_can_be_done_follows_the_command() -> None:
    error = missing("ray", "leave --engine ray away")
    assert isinstance(error, UsageError)
    assert str(error).endswith("[ray]', or leave --engine ray away.")


PARQUET = "PyArrow (Parquet) is not installed; run: "
HIDING = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    hidden = set(sys.argv[1].split(","))
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
import ffl_deploy.doors
sys.argv = [sys.argv[2], *sys.argv[3:]]
getattr(ffl_deploy.doors, sys.argv[0].removeprefix("ffl-"))()
"""


@pytest.mark.parametrize(
    ("hidden", "command", "said"),
    [
        ("torch", "ffl-train", "PyTorch is not installed; run: "),
        ("torch", "ffl-export RUN", "PyTorch is not installed; run: "),
        ("matplotlib", "ffl-export --report-only --out BUNDLES", "Matplotlib is not installed; run: "),
        ("uvicorn", "ffl-serve BUNDLES/tiny", "uvicorn is not installed; run: "),
        ("gradio", "ffl-serve BUNDLES/tiny --port 0", "Gradio is not installed; run: "),
        ("onnxruntime", "ffl-serve BUNDLES/tiny --no-demo --port 0", "ONNX Runtime is not installed; run: "),
        ("onnxruntime", "ffl-verify BUNDLES/tiny", "ONNX Runtime is not installed; run: "),
        ("onnxruntime", "ffl-predict BUNDLES/tiny IMAGE", "ONNX Runtime is not installed; run: "),
        ("pyarrow", "ffl-predict BUNDLES/tiny IMAGE --out rows.parquet", PARQUET),
        ("pyarrow", "ffl-predict BUNDLES/tiny x.parquet --out x.csv", PARQUET),
        ("ray", "ffl-predict BUNDLES/tiny IMAGE --engine ray", "Ray is not installed; run: "),
        ("msgspec", "ffl-verify BUNDLES/tiny", "msgspec is not installed; run: "),
    ],
)  # fmt: skip
def test_every_command_says_what_is_missing(
    hidden: str, command: str, said: str, tmp_path: Path, make_bundle: Callable[..., object]
) -> None:
    make_bundle(tmp_path / "BUNDLES" / "tiny")
    (tmp_path / "IMAGE").write_bytes((ROOT / "examples/cifar100/images/clock.jpg").read_bytes())
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    runs = ROOT / "tests/fixtures/before/run/runs.tar.xz"
    subprocess.run(["tar", "-xf", runs, "-C", tmp_path], check=True)
    run = next(tmp_path.glob("**/config.json")).parent
    words = command.replace("RUN", str(run)).split()
    done = subprocess.run(
        [sys.executable, "-c", HIDING, hidden, *words],
        capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert said in done.stderr.splitlines()[-1]
