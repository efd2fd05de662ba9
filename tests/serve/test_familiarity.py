"""A bundle with a threshold of familiarity: rows, the protocol, /classify and the demo say which images are
unlike the training images; one without says nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.decisions import Decisions
from ffl_deploy.familiarity import Familiarity
from ffl_deploy.images import load
from serve.demo.sentences import promise
from serve.server.settings import ModelSpec, Settings

PATHS = ("a.jpg", "b.png", "sub/c.webp")


@pytest.fixture(scope="module")
def knowing(make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its threshold lies between its golden images."""
    folder = tmp_path_factory.mktemp("familiarity")

    def bundle(name: str, threshold: float) -> Bundle:
        record = Familiarity(threshold, 0.95, "validation", 100, "", "test", 0.95, {})
        return make_bundle(folder / name, familiarity=record)

    first = bundle("first", 0.0)
    values = first.session().run(first.golden().images).familiarity
    assert values is not None
    return bundle("second", float(np.median(values)))


@pytest.fixture
def strange(knowing: Bundle, tmp_path: Path) -> tuple[Path, list[float], list[bool]]:
    """-> a folder of the golden images, their familiarity, and which are unfamiliar."""
    from PIL import Image

    (tmp_path / "golden").mkdir()
    images = knowing.golden().images
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "golden" / f"{number}.png")
    values = knowing.session().run(images).familiarity
    assert values is not None
    limit = knowing.variant().details.familiarity
    assert limit is not None
    unfamiliar = [bool(value < limit.threshold) for value in values]
    assert 0 < sum(unfamiliar) < len(unfamiliar), "the test needs both kinds"
    return tmp_path / "golden", values.tolist(), unfamiliar


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_have_the_number_and_the_remark(
    predict: Any, knowing: Bundle, strange: Any, suffix: str
) -> None:
    folder, values, unfamiliar = strange
    run = predict(folder, bundle=knowing, out=f"p.{suffix}")
    assert run.code == 0, "an unfamiliar image has an answer, and a remark"
    if suffix == "csv":
        import csv

        rows: Any = list(csv.DictReader(run.out.read_text().splitlines()))
    elif suffix == "parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(run.out).to_pylist()
    else:
        rows = run.rows
    assert [row["status"] for row in rows] == ["ok"] * len(values)
    assert [(row["error"] or "").startswith("unfamiliar: ") for row in rows] == unfamiliar
    np.testing.assert_allclose([float(row["familiarity"]) for row in rows], values, rtol=1e-5)


def test_both_remarks_stand_in_one_cell(predict: Any, knowing: Bundle, tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.new("RGB", (32, 32), colour) for colour in ("black", "white")]
    (tmp_path / "in").mkdir()
    frames[0].save(tmp_path / "in" / "a.gif", save_all=True, append_images=frames[1:])
    limit = knowing.variant().details.familiarity
    (row,) = predict(tmp_path / "in", bundle=knowing).rows
    assert limit is not None
    assert row["error"].startswith("animated: ")
    assert ("; unfamiliar: " in row["error"]) == (row["familiarity"] < limit.threshold)


def test_a_bundle_without_it_has_no_column(predict: Any, folder: Path) -> None:
    assert "familiarity" not in predict(folder).rows[0]


def test_what_is_no_number_is_unfamiliar(knowing: Bundle) -> None:
    limit = knowing.variant().details.familiarity
    assert limit is not None
    values = np.array([np.nan, np.inf, -np.inf, limit.threshold], np.float32)
    assert limit.unfamiliar(values).tolist() == [True, False, True, False]


def test_the_protocol_classify_and_the_demo_say_it(start_server: Any, knowing: Bundle, strange: Any) -> None:
    folder, values, unfamiliar = strange
    with start_server(Settings((ModelSpec("knowing", knowing.folder),), demo=False)) as running:
        outputs = httpx.get(f"{running.url}/v2/models/knowing").json()["outputs"]
        assert {"name": "familiarity", "datatype": "FP32", "shape": [-1]} in outputs
        assert {"name": "unfamiliar", "datatype": "BOOL", "shape": [-1]} in outputs

        images = knowing.golden().images
        tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape)}
        body = {"inputs": [{**tensor, "data": images.ravel().tolist()}]}
        answer = httpx.post(f"{running.url}/v2/models/knowing/infer", json=body).json()
        given = {one["name"]: one["data"] for one in answer["outputs"]}
        assert given["unfamiliar"] == unfamiliar
        np.testing.assert_allclose(given["familiarity"], values, rtol=1e-5)

        files = [("file", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        rows = httpx.post(f"{running.url}/classify", files=files).json()["images"]
        assert [row["unfamiliar"] for row in rows] == unfamiliar

    decided = Decisions.of(knowing.variant()).each(knowing.session().run(images), knowing.classes)
    assert ["unlike the images" in promise(one, None) for one in decided] == unfamiliar


def test_nothing_is_said_where_the_bundle_has_no_threshold(tiny_bundle: Bundle, folder: Path) -> None:
    pixels = load(folder / PATHS[0], tiny_bundle.preprocessing)[None]
    decisions = Decisions.of(tiny_bundle.variant())
    outputs = tiny_bundle.session().run(pixels)
    assert decisions.columns == []
    assert decisions.tensors(outputs) == {}
    assert promise(decisions.each(outputs, tiny_bundle.classes)[0], None) == ""
