"""Under load: ten minutes of everything at once, and SIGTERM in the middle of it."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import shutil
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
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

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
        self.image, (self.body, self.headers) = image, infer_body(image)
        self.logits = bundle.session().run(image).logits.ravel()

    def right(self, response: httpx.Response) -> bool:
        return bool(np.allclose(logits_of(response), self.logits, rtol=1e-4, atol=1e-5))


def logits_of(response: httpx.Response) -> list[float]:
    (logits,) = [output["data"] for output in response.json()["outputs"] if output["name"] == "logits"]
    return logits  # type: ignore[no-any-return]


class Replaced:
    """A bundle in whose place another one is put, again and again: two that take turns."""

    def __init__(self, where: Path, make_bundle: Callable[..., Bundle]) -> None:
        self.folder, self._where, self._turn = where / "replaced", where, 0
        bundles = [make_bundle(where / f"kept{seed}", seed=seed) for seed in (11, 12)]
        self._logits = [Answers(bundle).logits for bundle in bundles]
        shutil.copytree(where / "kept11", self.folder)

    def swap(self) -> None:
        """As an exporter does it: beside its place, then renamed."""
        self._turn = 1 - self._turn
        shutil.copytree(self._where / f"kept{11 + self._turn}", self._where / "new")
        self.folder.rename(self._where / "old")
        (self._where / "new").rename(self.folder)
        shutil.rmtree(self._where / "old")

    def whose(self, response: httpx.Response) -> int | None:
        """-> which of the two has answered."""
        found = [np.allclose(logits_of(response), one, rtol=1e-4, atol=1e-5) for one in self._logits]
        return found.index(True) if any(found) else None


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
    two_bundles: tuple[Bundle, Bundle],
    make_bundle: Callable[..., Bundle],
    serve_process: Start,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Good, bad, oversized and disconnecting clients, compressed and gRPC requests, a bundle that is replaced
    all the time, uploads and demo calls, mixed. FFL_SOAK_SECONDS shortens it.

    No error on a good request, no file left behind, and flat memory: the median of the last minute is less
    than 2 % above that of the minute after two minutes of warm-up. A shortened run warms up too little for
    that and is allowed 10 %.
    """
    seconds = float(os.environ.get("FFL_SOAK_SECONDS", "600"))
    answers = Answers(two_bundles[0])
    counts: Counter[str] = Counter()
    latencies: list[float] = []
    seen: set[int | None] = set()
    photo = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)).save(
        photo, "JPEG"
    )
    replaced = Replaced(tmp_path_factory.mktemp("replaced"), make_bundle)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    flags = ("--max-body-mib", "1", "--grpc-port", "0", "--watch", "0.3")
    with serve_process(str(two_bundles[0].folder), str(replaced.folder), *flags, env=environment) as running:
        url = f"{running.url}/v2/models/fused/infer"
        (ready,) = [line for line in map(json.loads, running.read_log().splitlines()) if "grpc_port" in line]
        grpc_address = f"127.0.0.1:{ready['grpc_port']}"
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

        def compressed(http: httpx.Client, chance: random.Random) -> None:
            packed = {**answers.headers, "content-encoding": "gzip", "accept-encoding": "gzip"}
            response = http.post(url, content=gzip.compress(answers.body, 1), headers=packed)
            expect("compressed", response, 200)
            if response.status_code == 200 and not answers.right(response):
                counts["wrong answer"] += 1

        def over_grpc(http: httpx.Client, chance: random.Random) -> None:
            # a connection for each, as of clients that come and go
            with triton.InferenceServerClient(grpc_address) as client:
                tensor = triton.InferInput("images", [1, 32, 32, 3], "UINT8")
                tensor.set_data_from_numpy(answers.image)
                packed = chance.choice([None, "gzip"])
                result = client.infer("fused", [tensor], compression_algorithm=packed).as_numpy("logits")
                right = np.allclose(result.ravel(), answers.logits, rtol=1e-4, atol=1e-5)
                counts["over grpc" if right else "wrong answer over grpc"] += 1
                try:
                    client.infer("nobody", [tensor])
                except InferenceServerException as error:
                    counts["bad over grpc" if "NOT_FOUND" in str(error.status()) else str(error)] += 1

        def of_replaced(http: httpx.Client, chance: random.Random) -> None:
            response = http.post(
                f"{running.url}/v2/models/{replaced.folder.name}/infer",
                content=answers.body,
                headers=answers.headers,
            )
            expect("of the replaced", response, 200)
            if response.status_code == 200:
                seen.add(replaced.whose(response))

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
        kinds += [compressed, over_grpc, of_replaced]

        def client(number: int) -> None:
            chance = random.Random(number)
            with httpx.Client(timeout=30) as http:
                while time.monotonic() < end:
                    try:
                        kinds[number % len(kinds)](http, chance)
                    except Exception as error:
                        counts[f"{kinds[number % len(kinds)].__name__}: {error!r}"] += 1
                    time.sleep(0.02)

        def replacing() -> None:
            while time.monotonic() < end:
                replaced.swap()
                time.sleep(3)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(len(kinds))]
        threads.append(threading.Thread(target=replacing))
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
    assert set(counts) == {
        "good", "bad", "oversized", "gone", "upload", "call", "demo", "broken upload", "compressed",
        "over grpc", "bad over grpc", "of the replaced",
    }, counts  # fmt: skip
    assert seen == {0, 1}  # each of the two bundles answered, and no other
    assert late < early * (1.02 if seconds >= 600 else 1.1)
    assert files < 80
    assert pieces == []
    assert list(tmp_path.rglob("*")) == []
