"""POST /classify: photographs in, labels out, as `curl -F file=@photo.jpg` sends them."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ffl_deploy.bundle import Bundle
from serve.server.settings import Limits, ModelSpec, Settings

Photo = Callable[..., bytes]


def rows(response: httpx.Response, status: int = 200) -> list[dict[str, Any]]:
    assert response.status_code == status, response.text
    return response.json()["images"]  # type: ignore[no-any-return]


def test_the_answer_is_that_of_the_bundle(
    server: Any, two_bundles: tuple[Bundle, Bundle], photo: Photo
) -> None:
    files = [photo(1, size=(300, 200)), photo(2, "PNG"), photo(3, "WEBP")]
    for bundle in two_bundles:
        response = httpx.post(
            f"{server.url}/classify?model={bundle.name}&top_k=2",
            files=[("file", (f"{number}.jpg", data)) for number, data in enumerate(files)],
        )
        assert response.json()["model"] == bundle.name
        assert response.json()["variant"] == "fp32"
        for number, (row, expected) in enumerate(
            zip(rows(response), bundle.predict(files, top_k=2), strict=True)
        ):
            assert row["file"] == f"{number}.jpg"
            assert row["label"] == expected.label == row["top"][0]["label"]
            np.testing.assert_allclose(row["confidence"], expected.confidence, rtol=1e-4)
            assert [entry["label"] for entry in row["top"]] == [label for label, _ in expected.top]


def test_a_body_that_is_one_image_and_the_first_model_without_a_name(
    server: Any, two_bundles: tuple[Bundle, Bundle], photo: Photo
) -> None:
    data = photo(4)
    response = httpx.post(f"{server.url}/classify", content=data, headers={"content-type": "image/jpeg"})
    (row,) = rows(response)
    assert response.json()["model"] == two_bundles[0].name
    assert row["label"] == two_bundles[0].predict([data])[0].label
    assert len(row["top"]) == 3  # cat, dog, frog: fewer than 5


def test_an_image_that_cannot_be_read_has_a_row_and_fails_no_neighbour(server: Any, photo: Photo) -> None:
    files = [
        ("file", ("a.jpg", photo(1))),
        ("file", ("notes.jpg", b"no image")),
        ("file", ("c.jpg", photo(2))),
    ]
    found = rows(httpx.post(f"{server.url}/classify", files=files))
    assert [row["file"] for row in found] == ["a.jpg", "notes.jpg", "c.jpg"]
    assert found[1]["code"] == "not_an_image"
    assert "label" not in found[1]
    assert {"label", "confidence", "top"} <= found[0].keys()
    assert found[2]["label"] == rows(httpx.post(f"{server.url}/classify", files=files[2:]))[0]["label"]
    assert rows(httpx.post(f"{server.url}/classify", files=files[1:2]), 400)[0]["code"] == "not_an_image"


@pytest.mark.parametrize(
    ("call", "status", "said"),
    [
        ({"method": "GET"}, 405, "curl -F file=@photo.jpg"),
        ({"content": b"{}"}, 400, "curl -F file=@photo.jpg"),
        ({"data": {"a": "b"}}, 400, "curl -F file=@photo.jpg"),
        ({"files": {"file": ("", b"")}}, 400, "no file"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "form cannot be read"),
        ({"query": "?model=fusd", "files": {"file": b"x"}}, 404, "there is no such model"),
        ({"query": "?top_k=0", "files": {"file": b"x"}}, 400, "top_k has to be"),
        ({"query": "?top_k=many", "files": {"file": b"x"}}, 400, "top_k has to be"),
        ({"files": [("file", ("x.jpg", b"x"))] * 65}, 400, "at most 64 images"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(
    server: Any, call: dict[str, Any], status: int, said: str
) -> None:
    arguments = {name: value for name, value in call.items() if name not in ("method", "query")}
    response = httpx.request(
        call.get("method", "POST"), f"{server.url}/classify{call.get('query', '')}", **arguments
    )
    assert response.status_code == status, response.text
    assert said in response.json()["error"]


def test_it_is_counted_and_bounded_as_the_protocol_is(
    start_server: Callable[..., Any], tiny_bundle: Bundle, photo: Photo
) -> None:
    settings = Settings(
        (ModelSpec("tiny", tiny_bundle.folder),), demo=False, limits=Limits(body_bytes=50_000)
    )
    with start_server(settings) as running:
        rows(httpx.post(f"{running.url}/classify", files={"file": photo(1)}))
        too_large = httpx.post(f"{running.url}/classify", files={"file": bytes(60_000)})
        foreign = httpx.post(
            f"{running.url}/classify", files={"file": photo(1)}, headers={"origin": "https://example.org"}
        )
        metrics = httpx.get(f"{running.url}/metrics").text
    assert (too_large.status_code, foreign.status_code) == (413, 403)
    assert 'route="classify",status="200"' in metrics


def test_the_demo_alone_has_no_such_route(start_server: Callable[..., Any], tiny_bundle: Bundle) -> None:
    settings = Settings((ModelSpec("tiny", tiny_bundle.folder),), protocol=False, demo=False)
    with start_server(settings) as running:
        assert httpx.post(f"{running.url}/classify", files={"file": b"x"}).status_code == 404


def test_curl_as_the_documentation_has_it(
    server: Any, two_bundles: tuple[Bundle, Bundle], tmp_path: Path, photo: Photo
) -> None:
    """A photograph of some megabytes too, which does not fit on a command line."""
    curl = shutil.which("curl")
    assert curl, "the documentation's first example needs curl (Debian: apt-get install curl)"
    (tmp_path / "photo.jpg").write_bytes(photo(1, size=(3000, 2000), quality=97))
    assert (tmp_path / "photo.jpg").stat().st_size > 2_000_000
    command = [curl, "-sf", "-F", "file=@photo.jpg", "-F", "file=@photo.jpg", f"{server.url}/classify"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, check=True)
    found = httpx.Response(200, content=io.BytesIO(done.stdout).read()).json()["images"]
    assert [row["file"] for row in found] == ["photo.jpg", "photo.jpg"]
    assert found[0]["label"] == two_bundles[0].predict([tmp_path / "photo.jpg"])[0].label


def test_metadata_names_the_classes_and_unknown_routes_say_which_there_are(
    server: Any, two_bundles: tuple[Bundle, Bundle]
) -> None:
    metadata = httpx.get(f"{server.url}/v2/models/fused").json()
    assert metadata["parameters"]["classes"] == list(two_bundles[0].classes)
    assert "POST /classify" in httpx.get(f"{server.url}/v2/models").json()["error"]
    pasted = httpx.post(f"{server.url}/v2/models/fused/infer", content=b"\xff\xd8\xff")
    assert "POST /classify" in pasted.json()["error"]


def test_the_documented_shell_lines_work_for_a_photograph_of_any_size(
    server: Any, two_bundles: tuple[Bundle, Bundle], tmp_path: Path, photo: Photo
) -> None:
    """Every curl of docs/serving.md, as it stands there."""
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    blocks = re.findall(r"(?:^    .*\n)+", page, re.M)
    commands = [block for block in blocks if "curl" in block]
    assert len(commands) == 2
    (tmp_path / "photo.jpg").write_bytes(photo(1, size=(3000, 2000), quality=97))
    (tmp_path / "a.jpg").write_bytes(photo(2))
    (tmp_path / "b.heic").write_bytes(photo(3))  # by its content, whatever its name
    script = "set -e\n" + "".join(commands).replace("localhost:7860", server.address)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    best = two_bundles[0].predict([tmp_path / "photo.jpg"])[0].label
    assert done.stdout.count(f'"label":"{best}"') >= 2
    assert f":{best}" in done.stdout  # by /v2, as value:index:label
    assert '"model":"branch0"' in done.stdout
