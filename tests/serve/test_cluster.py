"""Ray Serve on this machine: two replicas, the same answers, a bounded queue,
a rolling update without a failed request."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ffl_deploy.bundle import Bundle

pytestmark = [
    pytest.mark.slow,
    # Looked for, not imported: collecting the fast suite neither waits for Ray nor fails with it.
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[serve]"),
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """-> the URL of a local cluster's proxy."""
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"})
    import ray
    from ray import serve as ray_serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[2])
    ray.init(
        num_cpus=6,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def run(**arguments: Any) -> None:
    """What `serve run serve.cluster:app name=value ...` does."""
    from ray import serve as ray_serve

    from serve.cluster import app

    ray_serve.run(app({name: str(value) for name, value in arguments.items()}), name="ffl")


def request(image: np.ndarray) -> dict[str, Any]:
    return {
        "inputs": [
            {"name": "images", "shape": list(image.shape), "datatype": "UINT8", "data": image.tolist()}
        ]
    }


def logits(response: httpx.Response) -> np.ndarray:
    return np.float32(
        next(output["data"] for output in response.json()["outputs"] if output["name"] == "logits")
    )


def test_two_replicas_answer_as_the_bundle_and_a_rolling_update_fails_no_request(
    cluster: str, make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    old, new = make_bundle(tmp_path / "old"), make_bundle(tmp_path / "new", seed=9)
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    before, after = (bundle.session(threads=1).run(image).logits.ravel() for bundle in (old, new))
    run(bundles=f"fused={old.folder}", replicas=2)
    url = f"{cluster}/v2/models/fused/infer"
    assert httpx.get(f"{cluster}/v2/health/ready").status_code == 200
    assert httpx.get(f"{cluster}/-/healthz").text == "success"
    assert logits(httpx.post(url, json=request(image))) == pytest.approx(before, rel=1e-5)
    assert httpx.post(url, content=b"?").status_code == 400
    assert "error" in httpx.post(f"{cluster}/v2/models/other/infer", content=b"{}").json()

    counts: Counter[str] = Counter()
    done = threading.Event()

    def client() -> None:
        with httpx.Client(timeout=30) as http:
            while not done.is_set():
                try:
                    response = http.post(url, json=request(image))
                except httpx.TransportError as error:
                    counts[repr(error)] += 1
                    continue
                if response.status_code != 200:
                    counts[f"{response.status_code} {response.text[:80]}"] += 1
                elif np.allclose(logits(response), before, rtol=1e-4):
                    counts["old"] += 1
                elif np.allclose(logits(response), after, rtol=1e-4):
                    counts["new"] += 1
                else:
                    counts["wrong"] += 1

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    run(bundles=f"fused={new.folder}", replicas=2)
    time.sleep(2)
    done.set()
    for thread in threads:
        thread.join()
    assert set(counts) == {"old", "new"}, counts
    assert logits(httpx.post(url, json=request(image))) == pytest.approx(after, rel=1e-5)


def test_a_full_queue_is_503(cluster: str, make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "fused")
    run(bundles=bundle.folder, replicas=1, ongoing=1, queued=1)
    images = np.zeros((64, 32, 32, 3), np.uint8)
    statuses: Counter[int] = Counter()

    def client() -> None:
        with contextlib.suppress(httpx.TransportError):
            statuses[
                httpx.post(f"{cluster}/v2/models/fused/infer", json=request(images), timeout=60).status_code
            ] += 1

    threads = [threading.Thread(target=client) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 503}, statuses


def test_a_corrupt_bundle_never_takes_over(
    cluster: str, make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    """The deployment fails with its reason; an old replica answers all the while and afterwards."""
    good, bad = make_bundle(tmp_path / "good"), make_bundle(tmp_path / "bad")
    (bad.folder / "model.onnx").write_bytes(b"broken")
    run(bundles=f"fused={good.folder}", replicas=2)
    statuses: Counter[int] = Counter()
    done = threading.Event()

    def probe() -> None:
        while not done.is_set():
            statuses[httpx.get(f"{cluster}/v2/models/fused/ready", timeout=30).status_code] += 1
            time.sleep(0.1)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="failed"):
            run(bundles=f"fused={bad.folder}", replicas=2)
        time.sleep(1)
    finally:
        done.set()
        thread.join()
    assert set(statuses) == {200}
    assert statuses[200] > 10


def test_an_unknown_argument_is_refused() -> None:
    import msgspec

    from serve.cluster import Arguments, app

    with pytest.raises(msgspec.ValidationError, match="replica"):
        app({"bundles": "x", "replica": "2"})
    assert Arguments("x").replicas is None


@pytest.mark.parametrize(
    ("given", "gpus"),
    [
        ({}, 0),
        ({"runtime": "onnxruntime-cuda"}, 1),
        ({"runtime": "tensorrt", "gpus": 0.5}, 0.5),
        ({"runtime": "openvino"}, 0),
    ],
)
def test_a_replica_on_a_gpu_asks_ray_for_one(tiny_bundle: Bundle, given: dict[str, Any], gpus: float) -> None:
    pytest.importorskip("ray")
    from serve.cluster import app

    arguments = {name: str(value) for name, value in {"bundles": tiny_bundle.folder, **given}.items()}
    deployment = app(arguments)._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == gpus
    assert deployment.init_args[2] == given.get("runtime")
