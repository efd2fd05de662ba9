"""A cascade behind ffl-serve: the protocol, /classify and the demo say which exit answered, and the metrics
how many images were deferred."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.manifest import CascadeRecord, CascadeThreshold
from ffl_deploy.statistics import paired_difference
from serve.demo.answers import ask
from serve.demo.sentences import promise
from serve.server.settings import ModelSpec, Settings

EXITS = ["branch0", "fused"]


@pytest.fixture(scope="module")
def cascade(make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its threshold lies between the confidences of its golden images, so that both exits answer some."""
    folder = tmp_path_factory.mktemp("cascade")

    def bundle(name: str, threshold: float) -> Bundle:
        chosen = CascadeThreshold(threshold, 0.5, None, 0.1, "calibration", 100, "", 0.5, 0.0)
        right = np.ones(4, bool)
        record = CascadeRecord(EXITS, chosen, 0, 1.0, 0.5, paired_difference(right, right), [])
        return make_bundle(folder / name, cascade=record, golden_count=9)

    first = bundle("first", 0.5)
    confidences = first.session().run(first.golden().images).probabilities.max(axis=1)
    return bundle("second", float(np.median(confidences)))


def exit_counts(url: str) -> dict[str, float]:
    """-> exit -> the images that ffl_exit_images counts of it."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("ffl_exit_images_total{")]
    return {name: float(line.split()[-1]) for line in found for name in EXITS if f'exit="{name}"' in line}


def test_the_protocol_classify_and_metrics_say_which_exit_answered(
    start_server: Any, cascade: Bundle
) -> None:
    images = cascade.golden().images
    exits = cascade.session().run(images).exit
    assert exits is not None
    deferred = int(exits.sum())
    assert 0 < deferred < len(images), "the test needs both exits"

    with start_server(Settings((ModelSpec("two", cascade.folder),), demo=False)) as running:
        outputs = httpx.get(f"{running.url}/v2/models/two").json()["outputs"]
        assert {"name": "exit", "datatype": "INT64", "shape": [-1]} in outputs
        before = exit_counts(running.url)

        # JSON and binary
        tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape)}
        body = {"inputs": [{**tensor, "data": images.ravel().tolist()}]}
        answer = httpx.post(f"{running.url}/v2/models/two/infer", json=body).json()
        given = {one["name"]: one for one in answer["outputs"]}
        assert (given["exit"]["data"], given["exit"]["datatype"]) == (exits.tolist(), "INT64")
        import tritonclient.http as triton

        client = triton.InferenceServerClient(running.url.removeprefix("http://"))
        pixels = triton.InferInput("images", list(images.shape), "UINT8").set_data_from_numpy(images)
        binary = client.infer("two", [pixels]).as_numpy("exit")
        client.close()
        assert binary.dtype == np.int64
        np.testing.assert_array_equal(binary, exits)

        # the share deferred, of these two requests
        counted = {name: value - before.get(name, 0) for name, value in exit_counts(running.url).items()}
        assert counted == {"branch0": 2.0 * (len(images) - deferred), "fused": 2.0 * deferred}

        # photographs
        files = [("file", (f"{number}.png", png(image))) for number, image in enumerate(images)]
        rows = httpx.post(f"{running.url}/classify", files=files).json()["images"]
        assert [row["exit"] for row in rows] == [EXITS[number] for number in exits]


def test_the_demo_names_the_exit(start_server: Any, cascade: Bundle) -> None:
    import asyncio

    images = cascade.golden().images
    exits = cascade.session().run(images).exit
    assert exits is not None
    with start_server(Settings((ModelSpec("two", cascade.folder),), demo=False)) as running:
        model = running.service.models["two"]

        async def answers() -> list[dict[str, Any]]:
            return [(await ask(model, image)).promised for image in images]

        said = asyncio.run(answers())
    expected = [f", answered by {EXITS[number]}" for number in exits]
    assert [promise(one, None) for one in said] == expected


def test_another_bundle_counts_no_exits(start_server: Any, tiny_bundle: Bundle) -> None:
    with start_server(Settings((ModelSpec("one", tiny_bundle.folder),), demo=False)) as running:
        files = [("file", ("0.png", png(tiny_bundle.golden().images[0])))]
        (row,) = httpx.post(f"{running.url}/classify", files=files).json()["images"]
        assert "exit" not in row
        assert exit_counts(running.url) == {}


def png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
