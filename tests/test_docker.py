"""The Dockerfile, read and run as far as that goes without Docker: what each image installs, as whom it runs,
and the commands of the smallest one in a clean environment on a read-only root."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from ffl_deploy.bundle import Bundle
from serve.command import parse_arguments

ROOT = Path(__file__).parent.parent
SERVERS = ("serve-gpu", "serve-cpu")
TARGETS = ("train", *SERVERS)
Instructions = list[tuple[str, str]]


def stages() -> dict[str, Instructions]:
    """-> stage -> its instructions (word, rest), those of the stage that it is made from first."""
    found: dict[str, Instructions] = {}
    current: Instructions = []
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            image, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            current = found[name] = list(found.get(image, []))
        elif word:
            current.append((word, rest.strip()))
    return found


STAGES = stages()


def last(stage: str, word: str) -> str:
    """-> the rest of the instruction that counts."""
    return [rest for name, rest in STAGES[stage] if name == word][-1]


def extras_of(stage: str) -> list[str]:
    command = next(rest for word, rest in STAGES[stage] if word == "RUN" and "pip install" in rest)
    return re.search(r"\[([\w,-]+)\]", command)[1].split(",")  # type: ignore[index]


def closure(extras: list[str]) -> set[str]:
    """-> the names of the distributions that the extras ask for, those of extras inside them too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names, wanted = set(), list(extras)
    for extra in wanted:
        for requirement in project["optional-dependencies"][extra]:
            name = re.match(r"[\w-]+", requirement)[0]  # type: ignore[index]
            inner = re.match(r"[\w-]+\[([\w,-]+)\]", requirement)
            if name == "ffl-deploy":
                wanted += [other for other in inner[1].split(",") if other not in wanted]  # type: ignore[index]
            else:
                names.add(name)
    return names


def ignored(path: str) -> bool:
    """-> whether .dockerignore keeps `path` out of the build; the last rule that fits decides."""
    keep = True
    for rule in (ROOT / ".dockerignore").read_text().split():
        pattern = rule.removeprefix("!").removeprefix("**/")
        if fnmatch.fnmatch(path, pattern) or path.split("/")[0] == pattern:
            keep = rule.startswith("!")
    return not keep


def test_there_are_the_three_images() -> None:
    assert list(STAGES) == ["wheel", "base", *TARGETS]
    known = r"ARG|WORKDIR|COPY|RUN|ENV|USER|VOLUME|EXPOSE|HEALTHCHECK|ENTRYPOINT|CMD"
    words = {word for instructions in STAGES.values() for word, _ in instructions}
    assert [word for word in words if not re.fullmatch(known, word)] == []


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_user_of_its_own_and_writes_to_volumes_alone(target: str) -> None:
    user = last(target, "USER")
    assert user.isdecimal()
    assert int(user) > 0
    assert f"useradd --system --uid {user} " in " ".join(
        rest for word, rest in STAGES[target] if word == "RUN"
    )
    words = [word for word, _ in STAGES[target]]
    assert "RUN" not in words[words.index("USER") :], "everything is installed before"
    environment = dict(re.findall(r"(\w+)=(\S+)", last(target, "ENV")))
    assert environment["XDG_CACHE_HOME"] in json.loads(last(target, "VOLUME"))
    assert {environment["HOME"], environment["MPLCONFIGDIR"]} <= {"/tmp", "/tmp/matplotlib"}
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("target", TARGETS)
def test_what_an_image_installs_exists_and_is_pinned(target: str) -> None:
    command = next(rest for word, rest in STAGES[target] if word == "RUN" and "pip install" in rest)
    names = closure(extras_of(target))
    assert ("torch" in names) == (target == "train")
    runtimes = names & {"onnxruntime", "onnxruntime-gpu"}
    assert runtimes == {"onnxruntime" if target == "serve-cpu" else "onnxruntime-gpu"}
    files = re.findall(r"-c /(\S+)", command)
    assert files == ["constraints.txt", "constraints-gpu.txt"][: 1 if target == "serve-cpu" else 2]
    pinned = {
        re.split(r"==", line)[0].lower().replace("_", "-")
        for name in files
        for line in (ROOT / name).read_text().splitlines()
        if "==" in line
    }
    assert {name.lower().replace("_", "-") for name in names} - pinned == set()


def test_what_is_copied_is_there_and_reaches_the_build() -> None:
    copied = [
        name
        for instructions in STAGES.values()
        for word, rest in instructions
        if word == "COPY" and not rest.startswith("--from")
        for name in rest.split()[:-1]
        if name != "."
    ]
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    needed = [*packages["packages"], "pyproject.toml", "README.md", "LICENSE"]
    for name in {*copied, *needed}:
        assert (ROOT / name).exists()
        assert not ignored(name)
    for name in ("runs", "bundles", ".git", ".venv", "tests", "secret.pem"):
        assert ignored(name)


@pytest.mark.parametrize("target", SERVERS)
def test_a_server_starts_with_flags_that_there_are_and_has_a_health_check(target: str) -> None:
    program, *flags = json.loads(last(target, "ENTRYPOINT"))
    assert program == "ffl-serve"
    settings = parse_arguments([*flags, "/bundles/fused"])
    assert settings.host == "0.0.0.0"
    assert settings.port == int(last(target, "EXPOSE"))
    assert settings.runtime == ("tensorrt" if target == "serve-gpu" else None)
    timing, _, check = last(target, "HEALTHCHECK").partition("CMD ")
    assert re.search(r"--start-period=\d+m", timing)
    assert f"http://127.0.0.1:{settings.port}/v2/health/ready" in json.loads(check)[2]


def test_gpu_pins_do_not_repeat_the_others() -> None:
    def names(file: str) -> set[str]:
        return {line.split("==")[0] for line in (ROOT / file).read_text().splitlines() if "==" in line}

    assert names("constraints-gpu.txt") & names("constraints.txt") == set()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for cuda13, cuda12 in (("gpu", "gpu-cu12"), ("tensorrt", "tensorrt-cu12")):
        assert "cuda-bindings>=13,<14" in extras[cuda13]
        assert "cuda-bindings>=12.8,<13" in extras[cuda12]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that the mounts of a test stay below."""
    folder = Path(tempfile.mkdtemp(prefix="ffl-image-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def read_only(command: list[str], writable: list[Path]) -> list[str]:
    """-> `command` where nothing but `writable`, which is empty there, can be written to."""
    mounts = " && ".join(f"mount -t tmpfs tmpfs {shlex.quote(str(path))}" for path in writable)
    script = (
        f"mount --make-rprivate / && mount -o remount,bind,ro / && {mounts} && exec {shlex.join(command)}"
    )
    return ["unshare", "--mount", "sh", "-c", script]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_serve_cpu_on_a_read_only_root(
    place: Path, make_bundle: Callable[..., Bundle]
) -> None:
    writable = [place / "tmp", place / "cache"]
    for folder in writable:
        folder.mkdir(mode=0o700)
    probe = read_only(["sh", "-c", f"! touch {place}/x 2> {place}/tmp/said"], writable)
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("mounts of one's own are not allowed here")

    # what the stages `wheel` and `serve-cpu` run, with this machine's places
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place / "wheels", ROOT],
        check=True,
    )
    subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
    command = next(rest for word, rest in STAGES["serve-cpu"] if word == "RUN" and "pip install" in rest)
    command = command.replace("/constraints.txt", str(ROOT / "constraints.txt"))
    command = command.replace("/wheels/", f"{place}/wheels/")
    environment = os.environ | {"PATH": f"{place}/venv/bin:{os.environ['PATH']}", "PYTHONPATH": ""}
    subprocess.run(command, shell=True, check=True, env=environment)
    installed = subprocess.run(
        [place / "venv/bin/python", "-m", "pip", "list", "--format", "json"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert not {row["name"] for row in json.loads(installed)} & {"torch", "torchvision", "onnx"}

    # the server, its health check, an answer, and its end
    bundle = make_bundle(place / "bundles" / "fused")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment |= {
        "HOME": str(place / "tmp"), "TMPDIR": str(place / "tmp"), "XDG_CACHE_HOME": str(place / "cache"),
        "MPLCONFIGDIR": str(place / "tmp" / "matplotlib"), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    entry = [word.replace("7860", port) for word in json.loads(last("serve-cpu", "ENTRYPOINT"))]
    check = json.loads(last("serve-cpu", "HEALTHCHECK").partition("CMD ")[2].replace("7860", port))
    log = place / "log"
    with log.open("w") as errors:
        server = subprocess.Popen(
            read_only([*entry, str(bundle.folder)], writable), env=environment, stderr=errors, cwd="/"
        )
    try:
        deadline = time.monotonic() + 300
        while subprocess.run(check, env=environment, capture_output=True).returncode:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200, "the demo too"
        image = bundle.golden().images[:1]
        tensor = {"name": "images", "shape": list(image.shape), "datatype": "UINT8", "data": image.tolist()}
        answer = httpx.post(f"http://127.0.0.1:{port}/v2/models/fused/infer", json={"inputs": [tensor]})
        assert answer.status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, log.read_text()
    finally:
        server.kill()
        server.wait()
