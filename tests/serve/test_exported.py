"""Served bundles against the other commands: what `ffl-export` really wrote,
and the answers that `ffl-predict` writes."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.images import prepare
from serve.server.settings import ModelSpec, Settings

Start = Callable[..., contextlib.AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """`fused` and `branch0` of a short run on the digits, exported with --cam by the command,
    and a report over both."""
    from export.cli import main as export
    from train.run import main as train

    run, out = tmp_path_factory.mktemp("runs") / "digits", tmp_path_factory.mktemp("bundles")
    flags = [
        "--epochs",
        "2",
        "--branches",
        "resnet20,resnet20",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--quiet",
    ]
    assert train([*flags, "--out", str(run)]) == 0
    assert export([str(run), "--target", "fused", "--target", "branch0", "--cam", "--out", str(out)]) == 0
    assert export(["--report-only", "--out", str(out)]) == 0
    return [load_bundle(out / "fused"), load_bundle(out / "branch0")]


@pytest.fixture(scope="module")
def running(exported: list[Bundle], start_server: Start) -> Iterator[Any]:
    models = tuple(ModelSpec(bundle.name, bundle.folder) for bundle in exported)
    with start_server(Settings(models, demo=False, threads=1)) as server:
        yield server


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_the_demo_shows_each_image_its_own_map_where_the_network_saw_evidence(
    exported: list[Bundle], running: Any
) -> None:
    """What the panels receive for four images at once, which share batches, is each image's own map,
    at its own place."""
    import gradio as gr

    from serve.demo.answers import ask_all
    from serve.demo.classify_tab import _panels, _shown

    images = exported[0].golden().images[:4]

    async def ask() -> tuple[list[Any], list[Any]]:
        with gr.Blocks():
            panels = _panels(running.service)
        assert [panel.cam is not None for panel in panels.each] == [True, True]
        answers = await asyncio.gather(*[ask_all(running.service, pixels) for pixels in images])
        return answers, await asyncio.gather(
            *[_shown(running.service, panels, png(pixels)) for pixels in images]
        )

    answers, shown = asyncio.run(ask())
    for number, bundle in enumerate(exported):
        expected = bundle.session(threads=1).run(images)
        assert expected.cam is not None
        maps = np.stack([answer[number].cam for answer in answers])
        assert maps.shape == expected.cam.shape
        assert maps == pytest.approx(expected.cam, rel=1e-3, abs=1e-4)
        assert np.abs(maps[0] - maps[1]).max() > 0.01, "two digits cannot have one map"
        for index, parts in enumerate(shown):
            label, _, picture = parts[2 + 3 * number : 5 + 3 * number]  # behind the verdict and the row
            assert max(label, key=label.get) == bundle.classes[int(expected.logits[index].argmax())]
            assert maps[index].ravel()[warmest(picture, maps[index].shape)] > 0.95 * maps[index].max() > 0


def warmest(picture: Image.Image, shape: tuple[int, ...]) -> int:
    """-> the cell of a grid of `shape` where the picture is warmest (most red over blue)
    at the cell's centre, as flat index."""
    pixels = np.asarray(picture, dtype=np.float32)
    warmth = pixels[..., 0] - pixels[..., 2]
    rows = ((np.arange(shape[0]) + 0.5) * warmth.shape[0] / shape[0]).astype(int)
    columns = ((np.arange(shape[1]) + 0.5) * warmth.shape[1] / shape[1]).astype(int)
    return int(np.argmax(warmth[np.ix_(rows, columns)]))


@pytest.mark.slow
def test_the_map_is_an_output_of_the_protocol(exported: list[Bundle], running: Any) -> None:
    from tritonclient import http as triton

    images = exported[0].golden().images[:3]
    expected = exported[0].session(threads=1).run(images)
    assert expected.cam is not None
    with contextlib.closing(triton.InferenceServerClient(running.address)) as client:
        (described,) = [
            output for output in client.get_model_metadata("fused")["outputs"] if output["name"] == "cam"
        ]
        assert described["shape"] == [-1, *expected.cam.shape[1:]]
        tensor = triton.InferInput("images", list(images.shape), "UINT8").set_data_from_numpy(images)
        assert client.infer("fused", [tensor]).as_numpy("cam").tobytes() == expected.cam.tobytes()


@pytest.mark.slow
def test_the_exporters_report_is_shown(exported: list[Bundle], running: Any) -> None:
    from serve.demo import reports

    (report,) = reports.reports(running.service.models.values())
    assert report.picture == exported[0].folder.parent / "report.png"
    assert {row[0]: row[1] for row in report.rows} == {"fused / fp32": "fused", "branch0 / fp32": "branch0"}
    assert any(row[2] for row in report.rows), "one of them is on the Pareto front"
    assert report.advice.split()[0] in ("fused/fp32", "branch0/fp32")
    text = (exported[0].folder.parent / "report.md").read_text()
    for row in report.rows:
        accuracy, megabytes, gates = row[2].removesuffix("%"), row[7], row[8]
        assert all(f" {part} " in text for part in (accuracy, megabytes, gates)), row


@pytest.mark.slow
def test_tritonclient_gets_the_bits_that_ffl_predict_writes_of_an_export(
    exported: list[Bundle], running: Any, tmp_path: Path
) -> None:
    check_against_ffl_predict(exported[0], running, tmp_path)


def test_tritonclient_gets_the_bits_that_ffl_predict_writes(
    two_bundles: tuple[Bundle, Bundle], start_server: Start, tmp_path: Path
) -> None:
    models = (ModelSpec("fused", two_bundles[0].folder),)
    with start_server(Settings(models, demo=False, threads=1)) as server:
        check_against_ffl_predict(two_bundles[0], server, tmp_path)


def check_against_ffl_predict(bundle: Bundle, running: Any, folder: Path) -> None:
    """20 images of several sizes through `ffl-predict --logits` and through `/v2`, as files and as pixels:
    equal to the last bit.

    In the same batches of 8, 8 and 4 and with one thread on both sides: runtimes choose their kernels by
    batch size and threads, so that another batch may differ in the last bits.
    """
    from tritonclient import http as triton

    from serve.predict.command import main as predict

    rng, batch = np.random.default_rng(5), 8
    paths = [folder / f"{number:02d}.png" for number in range(20)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (*rng.integers(4, 60, 2), 3), dtype=np.uint8)).save(path)
    out = folder / "predictions.parquet"
    flags = ["--logits", "--batch-size", str(batch), "--threads", "1", "--quiet"]
    assert predict([str(bundle.folder), *map(str, paths), "--out", str(out), *flags]) == 0
    table = pq.read_table(out)
    assert table.column("path").to_pylist() == [str(path) for path in paths]
    expected = np.array(table.column("logits").to_pylist(), np.float32)
    assert np.unique(expected, axis=0).shape[0] == len(paths)
    with contextlib.closing(triton.InferenceServerClient(running.address)) as client:
        for start in range(0, len(paths), batch):
            files = np.array([path.read_bytes() for path in paths[start : start + batch]], dtype=np.object_)
            tensor = triton.InferInput("encoded", [len(files)], "BYTES").set_data_from_numpy(files)
            logits = client.infer(bundle.name, [tensor]).as_numpy("logits")
            assert logits.tobytes() == expected[start : start + batch].tobytes()
        pixels = np.stack(
            [prepare(np.asarray(Image.open(path)), bundle.preprocessing) for path in paths[:batch]]
        )
        tensor = triton.InferInput("images", list(pixels.shape), "UINT8").set_data_from_numpy(pixels)
        assert client.infer(bundle.name, [tensor]).as_numpy("logits").tobytes() == expected[:batch].tobytes()
