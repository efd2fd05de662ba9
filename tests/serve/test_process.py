"""The life of the server's process: what it starts with, when it is ready, how it ends."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import CheckError, UsageError
from serve.command import parse_arguments
from serve.server.settings import ModelSpec, Settings
from tests.serve.asking import json_request, pixels_of, wait_until

Start = Callable[..., contextlib.AbstractContextManager[Any]]


def test_it_is_live_before_it_is_ready_and_ready_only_when_every_bundle_is_verified(
    two_bundles: tuple[Bundle, Bundle], start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    import serve.server.service

    release, real = threading.Event(), serve.server.service.open_model

    def slow(spec: ModelSpec, *arguments: Any) -> Any:
        if spec.name == "branch0":
            assert release.wait(120)
        return real(spec, *arguments)

    monkeypatch.setattr(serve.server.service, "open_model", slow)
    models = tuple(ModelSpec(bundle.name, bundle.folder) for bundle in two_bundles)
    seen: dict[str, int] = {}

    def probe() -> None:
        try:
            port = ports.get(timeout=60)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:
                    with contextlib.suppress(httpx.TransportError):
                        if client.get("/v2/models/fused/ready").status_code == 200:
                            break
                    time.sleep(0.01)
                seen["live"] = client.get("/v2/health/live").status_code
                seen["ready"] = client.get("/v2/health/ready").status_code
                seen["fused"] = client.get("/v2/models/fused/ready").status_code
                seen["branch0"] = client.get("/v2/models/branch0/ready").status_code
                seen["page"] = client.get("/").status_code
        finally:
            release.set()

    import queue

    ports: queue.Queue[int] = queue.Queue()
    real_init = serve.server.service.Service.__init__

    def init(self: Any, settings: Settings, *rest: Any) -> None:
        real_init(self, settings, *rest)
        ports.put(settings.port)

    monkeypatch.setattr(serve.server.service.Service, "__init__", init)
    thread = threading.Thread(target=probe)
    thread.start()
    with start_server(Settings(models, demo=False)) as running:
        thread.join()
        assert seen == {"live": 200, "ready": 503, "fused": 200, "branch0": 503, "page": 200}
        assert httpx.get(f"{running.url}/v2/health/ready").status_code == 200


@pytest.mark.parametrize("damage", ["byte", "missing", "golden", "manifest"])
def test_a_corrupt_bundle_ends_the_server_with_code_1_and_one_sentence(
    make_bundle: Callable[..., Bundle], tmp_path: Path, damage: str
) -> None:
    """Bad input 30: refused, never ready."""
    good, bad = make_bundle(tmp_path / "good"), make_bundle(tmp_path / "bad")
    if damage == "byte":
        content = bytearray((bad.folder / "model.onnx").read_bytes())
        content[len(content) // 2] ^= 1
        (bad.folder / "model.onnx").write_bytes(content)
    elif damage == "missing":
        (bad.folder / "README.md").unlink()
    elif damage == "golden":  # a consistent bundle of another model's answers
        other = make_bundle(tmp_path / "other", seed=5)
        (bad.folder / "golden.npz").write_bytes((other.folder / "golden.npz").read_bytes())
        text = (bad.folder / "bundle.json").read_text()
        text = text.replace(bad.manifest.golden.sha256, other.manifest.golden.sha256)
        manifest = json.loads(text)
        manifest["files"]["golden.npz"]["bytes"] = (other.folder / "golden.npz").stat().st_size
        (bad.folder / "bundle.json").write_text(json.dumps(manifest))
    else:
        (bad.folder / "bundle.json").write_text("{")
    command = [
        sys.executable,
        "-m",
        "serve.command",
        str(good.folder),
        str(bad.folder),
        "--port",
        "0",
        "--no-demo",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "error: " in last
    assert str(bad.folder) in last
    assert "Traceback" not in done.stderr
    assert '"ready"' not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing"], "there is no folder missing"),
        (["{bundle}", "{bundle}"], "two bundles are called"),
        (["{bundle}", "--variant", "int8"], "no variant 'int8'"),
        (["{bundle}", "--port", "99999"], "--port"),
        (["{bundle}", "--host", "203.0.113.7"], "cannot listen"),
        (["{bundle}", "--max-batch", "0"], "argument --max-batch: must be at least 1, not 0"),
        (["{bundle}", "--threads", "0"], "argument --threads: must be at least 1, not 0"),
        (["{bundle}", "--workers", "two"], "argument --workers: 'two' is not a whole number"),
        (["a b={bundle}"], "cannot be a model's name"),
        (["{bundle}", "--token-file", "{short}"], "at least 16"),
        (["{bundle}", "--token-file", "{binary}"], "more than plain text"),
        (["{bundle}", "--token-file", "{bundle}/nofile"], "/nofile cannot be read (no such file"),
        (["{bundle}", "--host", "a..b"], "is no address of this machine"),
        (["{bundle}", "--prot", "80"], "Did you mean --port?"),
    ],
)
def test_unusable_arguments_are_one_sentence_and_code_2(
    two_bundles: tuple[Bundle, Bundle],
    tmp_path: Path,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ffl_deploy.command import run_command
    from serve.command import main

    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 20)
    paths = {"bundle": two_bundles[0].folder, "short": tmp_path / "short", "binary": tmp_path / "binary"}
    filled = [text.format(**paths) for text in arguments]
    assert run_command(main, [*filled, "--no-demo"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_port_in_use_says_so(two_bundles: tuple[Bundle, Bundle], server: Any) -> None:
    from serve.lifecycle import open_port

    with pytest.raises(UsageError, match="--port"):
        open_port("127.0.0.1", int(server.url.rsplit(":", 1)[1]))


def test_names(tmp_path: Path) -> None:
    (tmp_path / "x=y").mkdir()
    assert ModelSpec.parse("cats=bundles/fused") == ModelSpec("cats", Path("bundles/fused"))
    assert ModelSpec.parse("bundles/fused/", "int8") == ModelSpec("fused", Path("bundles/fused"), "int8")
    with pytest.raises(UsageError, match="cannot be a model's name"):
        ModelSpec.parse(str(tmp_path / "x=y"))
    settings = parse_arguments(["b", "--no-demo", "--max-queue", "5"])
    assert settings.host == "127.0.0.1"
    assert settings.limits.queued_images == 5
    assert replace(settings, demo=True).demo


def test_sigterm_drains_and_exits_0(two_bundles: tuple[Bundle, Bundle], serve_process: Start) -> None:
    """The first signal drains for as long as it was told to, a second one ends that."""
    with (
        serve_process(str(two_bundles[0].folder), "--no-demo", "--drain", "200") as running,
        httpx.Client() as client,
    ):
        assert client.get(f"{running.url}/v2/health/ready").status_code == 200
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get(f"{running.url}/v2/health/ready").status_code != 200)
        draining = client.get(f"{running.url}/v2/health/ready")
        assert (draining.status_code, draining.json()["phase"]) == (503, "draining")
        answered = client.post(
            f"{running.url}/v2/models/fused/infer", json=json_request(pixels_of(two_bundles[0], 1))
        )
        assert answered.status_code == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
        log = [json.loads(line) for line in running.read_log().splitlines()]
        assert [entry["message"] for entry in log if entry["level"] == "info"] == [
            "model verified",
            "ready",
            "draining",
        ]


def test_an_open_page_does_not_hold_up_the_end(
    two_bundles: tuple[Bundle, Bundle], serve_process: Start
) -> None:
    """Every page of the demo holds a stream that never ends by itself."""
    with serve_process(str(two_bundles[0].folder), "--drain", "0", "--shutdown", "200") as running:
        with httpx.stream("GET", f"{running.url}/gradio_api/heartbeat/x", timeout=60) as stream:
            assert next(stream.iter_lines()) == "data: ALIVE"
            running.process.terminate()
            assert running.process.wait(100) == 0
        assert "Traceback" not in running.read_log()


def test_a_bundle_whose_golden_answers_differ_is_refused(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    from serve.server.models import verify

    bundle, other = make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", seed=3)
    with pytest.raises(
        CheckError,
        match=r"variant fp32 of .* does not give PyTorch.s logits on this processor with onnxruntime",
    ):
        verify(bundle, bundle.variant(), other.session(), 4)
