"""onnxruntime-web, pinned: from npm, or from a folder that was prepared with npm. Every file by its hash."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import sha256_of

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
NPM_SECONDS = 300.0


@dataclass(frozen=True)
class Runtime:
    """`module` is what the page imports, `wasm` what that loads;
    `sha256` of both as npm has them in VERSION."""

    module: str
    wasm: str
    sha256: Mapping[str, str]
    webgpu: bool = False


WASM = Runtime(
    "ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.wasm",
    {
        "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
        "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    },
)
WEBGPU = Runtime(
    "ort.webgpu.bundle.min.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
    {
        "ort.webgpu.bundle.min.mjs": "0730816731ce2cdfb06f273da065d4a1c7091eb9d1756a83b2916c8a89d015e2",
        "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",  # noqa: E501
    },
    webgpu=True,
)


def require_runtime(folder: Path | None = None, runtime: Runtime = WASM) -> None:
    """Raises UsageError where neither npm nor a folder with the files is there;
    asked before any long work."""
    if folder is not None:
        _found(runtime, folder)
    else:
        _npm(runtime)


@contextlib.contextmanager
def runtime_files(runtime: Runtime, folder: Path | None = None) -> Iterator[dict[str, Path]]:
    """Yield name -> path of the runtime's files, each with its hash checked.

    Args: folder: where they lie: unpacked from npm, or `runtime/` of another page. None: npm downloads them.
    Raises UsageError without npm, or where the folder lacks a file; CheckError for a file of another version.
    """
    if folder is not None:
        yield _checked(runtime, _found(runtime, folder))
        return
    npm = _npm(runtime)
    with tempfile.TemporaryDirectory(prefix="ffl-web-") as temporary:
        unpacked = Path(temporary)
        with tarfile.open(_download(npm, unpacked)) as archive:
            archive.extractall(unpacked, filter="data")
        yield _checked(runtime, unpacked / "package" / "dist")


def _npm(runtime: Runtime) -> str:
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError(
            f"the page needs {PACKAGE} {VERSION}, which npm downloads, and npm is not installed here; "
            f"install Node.js, or copy {runtime.module} and {runtime.wasm} of that package into a folder "
            "and give --runtime-folder DIR (runtime/ of a page that was built elsewhere is one)."
        )
    return npm


def _download(npm: str, folder: Path) -> Path:
    """-> the package as npm packs it; from npm's own cache where it has been downloaded before."""
    command = [
        npm,
        "pack",
        f"{PACKAGE}@{VERSION}",
        "--pack-destination",
        str(folder),
        "--prefer-offline",
        "--ignore-scripts",
    ]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=NPM_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise CheckError(
            f"npm did not download {PACKAGE} {VERSION} within {NPM_SECONDS:.0f} s; try again."
        ) from error
    packed = sorted(folder.glob("*.tgz"))
    if done.returncode or not packed:
        lines = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower()]
        reason = f" ({lines[-1]})" if lines else ""
        raise CheckError(
            f"npm could not download {PACKAGE} {VERSION}{reason}; check the connection, or give "
            "--runtime-folder DIR."
        )
    return packed[0]


def _found(runtime: Runtime, folder: Path) -> Path:
    """-> the folder below `folder` that has the files. Raises UsageError."""
    for place in (
        folder,
        folder / "dist",
        folder / "package" / "dist",
        folder / "node_modules" / PACKAGE / "dist",
    ):
        if all((place / name).is_file() for name in runtime.sha256):
            return place
    raise UsageError(
        f"--runtime-folder {folder} does not hold {' and '.join(runtime.sha256)}; take them from {PACKAGE} "
        f"{VERSION} on npm."
    )


def _checked(runtime: Runtime, folder: Path) -> dict[str, Path]:
    for name, sha256 in runtime.sha256.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256:
            raise CheckError(
                f"{name} is not the one of {PACKAGE} {VERSION} (SHA-256 differs); take that from npm."
            )
    return {name: folder / name for name in runtime.sha256}
