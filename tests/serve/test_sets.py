"""--sets: rows, the protocol, /classify and the demo say the same set and whether to abstain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.images import load
from ffl_deploy.sets import CalibratedSets, MeasuredSets, SetLevel
from serve.demo.answers import Answer
from serve.demo.sentences import promise
from serve.server.settings import ModelSpec, Settings

MEASURED = MeasuredSets("test", 0, 0.0, 0.0, 0.0, 0.0, None)
LEVELS = [
    SetLevel("90", 0.9, [0.05], 0.6, MEASURED),
    SetLevel("90-by-class", 0.9, [0.0, 1.0, 1.0], 0.6, MEASURED),  # cat always; the others where predicted
    SetLevel("99", 0.99, [0.0], None, MEASURED),
]


@pytest.fixture(scope="module")
def promising(make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    sets = CalibratedSets("calibration", 100, "", 0.1, LEVELS)
    return make_bundle(tmp_path_factory.mktemp("sets") / "sure", sets=sets)


def expected(bundle: Bundle, path: Path, level: SetLevel) -> tuple[list[str], bool]:
    """-> set and abstention, from the public prediction."""
    (found,) = bundle.predict([path], top_k=3)
    thresholds = level.thresholds * (3 if len(level.thresholds) == 1 else 1)
    limits = dict(zip(bundle.classes, thresholds, strict=True))
    members = [label for label, value in found.top if value >= limits[label] or label == found.label]
    return members, level.answers_above is None or found.confidence <= level.answers_above


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_rows_carry_the_set(predict: Any, promising: Bundle, folder: Path, level: SetLevel) -> None:
    run = predict(folder, flags=["--sets", level.name], bundle=promising)
    assert run.code == 0
    for row in run.rows:
        assert (row["set_labels"], row["abstain"]) == expected(promising, Path(row["path"]), level)


def test_an_image_that_is_no_image_has_no_set(predict: Any, promising: Bundle, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"no image")
    (row,) = predict(tmp_path / "in", flags=["--sets", "90"], bundle=promising).rows
    assert (row["set_labels"], row["abstain"]) == (None, None)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_other_formats_have_the_columns_too(
    predict: Any, promising: Bundle, folder: Path, suffix: str
) -> None:
    rows = predict(folder, flags=["--sets", "90"], bundle=promising).rows
    out = predict(folder, flags=["--sets", "90"], bundle=promising, out=f"p.{suffix}").out
    if suffix == "csv":
        import csv

        read = [
            (json.loads(row["set_labels"]), json.loads(row["abstain"]))
            for row in csv.DictReader(out.read_text().splitlines())
        ]
    else:
        import pyarrow.parquet

        read = [(row["set_labels"], row["abstain"]) for row in pyarrow.parquet.read_table(out).to_pylist()]
    assert read == [(row["set_labels"], row["abstain"]) for row in rows]


def test_without_the_flag_no_column_comes(predict: Any, promising: Bundle, folder: Path) -> None:
    assert "abstain" not in predict(folder, bundle=promising).rows[0]


def test_what_cannot_be_asked_for_is_said(predict: Any, promising: Bundle, folder: Path) -> None:
    unknown = predict(folder, flags=["--sets", "95"], bundle=promising)
    assert unknown.code == 2
    assert "99" in unknown.stderr
    none = predict(folder, flags=["--sets", "90"])
    assert none.code == 2
    assert "export the bundle again with ffl-export --sets" in none.stderr


def test_the_protocol_and_classify_say_the_same(start_server: Any, promising: Bundle, folder: Path) -> None:
    level, paths = LEVELS[0], [folder / "a.jpg", folder / "b.png"]
    with start_server(Settings((ModelSpec("sure", promising.folder),), demo=False, sets="90")) as running:
        outputs = httpx.get(f"{running.url}/v2/models/sure").json()["outputs"]
        assert {"name": "set", "datatype": "BOOL", "shape": [-1, 3]} in outputs
        assert {"name": "abstain", "datatype": "BOOL", "shape": [-1]} in outputs

        files = [("file", (path.name, path.read_bytes())) for path in paths]
        rows = httpx.post(f"{running.url}/classify", files=files).json()["images"]
        assert [(row["set"], row["abstain"]) for row in rows] == [
            expected(promising, path, level) for path in paths
        ]

        images = promising.golden().images
        answered = promising.session().run(images)
        tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape)}
        body = {"inputs": [{**tensor, "data": images.ravel().tolist()}]}
        given = {
            one["name"]: one
            for one in httpx.post(f"{running.url}/v2/models/sure/infer", json=body).json()["outputs"]
        }
        member, abstain = level.answers(answered.probabilities)
        assert given["set"]["data"] == member.ravel().tolist()
        assert given["abstain"]["data"] == abstain.tolist()

        import tritonclient.http as triton

        client = triton.InferenceServerClient(running.url.removeprefix("http://"))
        pixels = triton.InferInput("images", list(images.shape), "UINT8").set_data_from_numpy(images)
        np.testing.assert_array_equal(client.infer("sure", [pixels]).as_numpy("set"), member)
        client.close()


def test_the_demo_says_it_in_words(start_server: Any, promising: Bundle, folder: Path) -> None:
    settings = Settings((ModelSpec("sure", promising.folder),), demo=False, sets="90")
    with start_server(settings) as running:
        model = running.service.models["sure"]
        outputs = model.session.run(load(folder / "a.jpg", promising.preprocessing)[None])
        top = promising.prediction(outputs.logits[0], outputs.probabilities[0]).top
        answer = Answer(model, top, 1.0, None, model.decisions.each(outputs, promising.classes)[0])
    members, abstain = expected(promising, folder / "a.jpg", LEVELS[0])
    assert answer.as_json()["set"] == members
    said = promise(answer.promised, LEVELS[0])
    assert ", ".join(members) in said
    assert ("Too unsure" in said) == abstain
    assert promise({}, None) == ""
