"""Under load: ten minutes of everything at once, and SIGTERM in the middle of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle

Start = Callable[..., contextlib.AbstractContextManager[Any]]
MEMORY_SAMPLES = 100


def infer_body(images: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """-> (body, headers) of a binary request."""
    tensor = {
        "name": "images",
        "shape": list(images.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": images.nbytes},
    }
    header = json.dumps({"inputs": [tensor]}).encode()
    return header + images.tobytes(), {"inference-header-content-length": str(len(header))}


class Answers:
    """The one image that every client sends, and what its logits have to be."""

    def __init__(self, bundle: Bundle) -> None:
        image = np.random.default_rng(3).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
        self.body, self.headers = infer_body(image)
        self.logits = bundle.session().run(image).logits.ravel()

    def right(self, response: httpx.Response) -> bool:
        (logits,) = [output["data"] for output in response.json()["outputs"] if output["name"] == "logits"]
        return bool(np.allclose(logits, self.logits, rtol=1e-4, atol=1e-5))


def test_sigterm_under_load_loses_no_accepted_request(
    two_bundles: tuple[Bundle, Bundle], serve_process: Start
) -> None:
    """16 clients that never pause: every request sent on an established connection is answered,
    and the exit code is 0."""
    answers = Answers(two_bundles[0])
    counts: Counter[str] = Counter()
    with serve_process(str(two_bundles[0].folder), "--no-demo", "--drain", "3") as running:
        url = f"{running.url}/v2/models/fused/infer"

        def client() -> None:
            with httpx.Client(timeout=60) as http:
                while True:
                    try:
                        response = http.post(url, content=answers.body, headers=answers.headers)
                    except httpx.ConnectError:  # the port is closed: nothing was accepted
                        return
                    except httpx.TransportError as error:
                        counts[f"lost: {error!r}"] += 1
                        return
                    counts[
                        "right"
                        if response.status_code == 200 and answers.right(response)
                        else str(response.status_code)
                    ] += 1

        threads = [threading.Thread(target=client) for _ in range(16)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while counts["right"] < 200 and len(counts) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        running.process.send_signal(signal.SIGTERM)
        code = running.process.wait(60)
        for thread in threads:
            thread.join()
    assert code == 0
    assert set(counts) == {"right"}, counts
    assert counts["right"] > 200


@pytest.mark.slow
def test_two_bundles_are_ready_in_time(two_bundles: tuple[Bundle, Bundle], serve_process: Start) -> None:
    """The promise is 8 s on a quiet machine (`-s` prints the time); three times that is allowed here,
    where others may use it."""
    began = time.monotonic()
    with serve_process(*[str(bundle.folder) for bundle in two_bundles]):
        seconds = time.monotonic() - began
    print(f"\nstart to ready: {seconds:.2f} s")
    assert seconds < 24


def open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def resident_mib(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_ten_minutes_of_everything(
    two_bundles: tuple[Bundle, Bundle], serve_process: Start, tmp_path: Path
) -> None:
    """Good, bad, oversized and disconnecting clients, uploads and demo calls, mixed.
    FFL_SOAK_SECONDS shortens it.

    No error on a good request, no file left behind, and flat memory: the median of the last minute is less
    than 2 % above that of the minute after two minutes of warm-up. A shortened run warms up too little for
    that and is allowed 10 %.
    """
    seconds = float(os.environ.get("FFL_SOAK_SECONDS", "600"))
    answers = Answers(two_bundles[0])
    counts: Counter[str] = Counter()
    latencies: list[float] = []
    photo = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)).save(
        photo, "JPEG"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with serve_process(
        *[str(bundle.folder) for bundle in two_bundles], "--max-body-mib", "1", env=environment
    ) as running:
        url = f"{running.url}/v2/models/fused/infer"
        host, port = running.address.split(":")
        end = time.monotonic() + seconds

        def expect(kind: str, response: httpx.Response, status: int) -> None:
            counts[
                kind
                if response.status_code == status
                else f"{kind}: {response.status_code} {response.text[:80]}"
            ] += 1

        def good(http: httpx.Client, chance: random.Random) -> None:
            began = time.perf_counter()
            response = http.post(url, content=answers.body, headers=answers.headers)
            latencies.append(time.perf_counter() - began)
            expect("good", response, 200)
            if response.status_code == 200 and not answers.right(response):
                counts["wrong answer"] += 1

        def bad(http: httpx.Client, chance: random.Random) -> None:
            expect("bad", http.post(url, content=chance.randbytes(chance.randrange(400))), 400)

        def oversized(http: httpx.Client, chance: random.Random) -> None:
            try:
                expect("oversized", http.post(url, content=b"x" * (3 << 20)), 413)
            except httpx.TransportError:  # refused while it was still being sent
                counts["oversized"] += 1

        def gone(http: httpx.Client, chance: random.Random) -> None:
            with socket.create_connection((host, int(port))) as connection:
                head = (
                    "POST /v2/models/fused/infer HTTP/1.1\r\nHost: x\r\nContent-Length: "
                    f"{len(answers.body)}\r\n"
                )
                rest = (
                    "Inference-Header-Content-Length: "
                    f"{answers.headers['inference-header-content-length']}\r\n\r\n"
                )
                whole = (head.replace("Host: x", "Host: 127.0.0.1") + rest).encode() + answers.body
                connection.sendall(whole[: chance.choice([20, len(whole) // 2, len(whole)])])
            counts["gone"] += 1

        def upload(http: httpx.Client, chance: random.Random) -> None:
            content = photo.getvalue() if chance.random() < 0.5 else chance.randbytes(1000)
            answer = http.post(f"{running.url}/gradio_api/upload", files={"files": ("x.jpg", content)})
            expect("upload", answer, 200)
            reference = {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}, "orig_name": "x.jpg"}
            call = http.post(f"{running.url}/gradio_api/call/classify", json={"data": [reference]})
            expect("call", call, 200)
            result = http.get(f"{running.url}/gradio_api/call/classify/{call.json()['event_id']}").text
            counts[
                "demo"
                if ("event: complete" in result) == (content == photo.getvalue())
                else f"demo: {result[:80]}"
            ] += 1

        def broken_upload(http: httpx.Client, chance: random.Random) -> None:
            with socket.create_connection((host, int(port))) as connection:
                head = (
                    "POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: "
                    "multipart/form-data; boundary=b\r\n"
                )
                part = (
                    b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n'
                    + b"x" * 100_000
                )
                connection.sendall(f"{head}Content-Length: 900000\r\n\r\n".encode() + part)
            counts["broken upload"] += 1

        kinds = [good] * 3 + [bad, oversized, gone, upload, broken_upload]

        def client(number: int) -> None:
            chance = random.Random(number)
            with httpx.Client(timeout=30) as http:
                while time.monotonic() < end:
                    try:
                        kinds[number % len(kinds)](http, chance)
                    except Exception as error:
                        counts[f"{kinds[number % len(kinds)].__name__}: {error!r}"] += 1
                    time.sleep(0.02)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(len(kinds))]
        for thread in threads:
            thread.start()
        memory: list[float] = []
        for _ in range(MEMORY_SAMPLES):
            time.sleep(seconds / MEMORY_SAMPLES)
            memory.append(resident_mib(running.process.pid))
        for thread in threads:
            thread.join()
        ended = time.monotonic()
        while (
            pieces := [path for path in tmp_path.rglob("tmp*") if path.is_file()]
        ) and time.monotonic() < ended + 60:
            time.sleep(0.5)  # uploads that broke off at the end are still being noticed
        files = open_files(running.process.pid)
        running.process.terminate()
        assert running.process.wait(40) == 0
    minute = MEMORY_SAMPLES // 10
    early, late = np.median(memory[2 * minute : 3 * minute]), np.median(memory[-minute:])
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    clean = f"{files} open files, clean and ended after {time.monotonic() - ended:.1f} s"
    course = ", ".join(
        f"{np.median(memory[start : start + minute]):.0f}" for start in range(0, MEMORY_SAMPLES, minute)
    )
    print(
        f"\n{dict(counts)}\np50 {p50:.1f} ms, p99 {p99:.1f} ms, {clean}\nMiB resident in each tenth: {course}"
    )
    assert set(counts) == {"good", "bad", "oversized", "gone", "upload", "call", "demo", "broken upload"}, (
        counts
    )
    assert late < early * (1.02 if seconds >= 600 else 1.1)
    assert files < 80
    assert pieces == []
    assert list(tmp_path.rglob("*")) == []
