"""Images at addresses: what the command line names is fetched, and nothing else."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ffl_deploy.errors import UsageError
from serve.inputs import remote
from serve.inputs.items import identity
from serve.inputs.sources import Reading, check_inputs, count_inputs, read_inputs

Photo = Callable[..., bytes]
Predict = Callable[..., Any]


@pytest.fixture
def store(photo: Photo, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Objects in fsspec's own memory, in the place of a bucket."""
    monkeypatch.setitem(remote.SCHEMES, "memory", "fsspec")
    files = fsspec.filesystem("memory")
    files.store.clear()
    for name, content in {
        "b/cat/1.jpg": photo(1), "b/dog/2.png": photo(2, "PNG"), "b/notes.txt": b"x", "b/z.jpg": b"no image"
    }.items():  # fmt: skip
        files.pipe(f"/{name}", content)
    yield files
    files.store.clear()


def test_a_prefix_gives_its_images_sorted_and_labelled(store: Any, photo: Photo) -> None:
    reading = Reading(frozenset({"cat", "dog"}))
    check_inputs(["memory://b"], reading)
    items = list(read_inputs(["memory://b"], reading))
    assert [(item.path, item.label) for item in items] == [
        ("memory:///b/cat/1.jpg", "cat"), ("memory:///b/dog/2.png", "dog"), ("memory:///b/z.jpg", None)
    ]  # fmt: skip
    assert items[0].read() == photo(1)
    assert dict(reading.skipped.reasons) == {"files without an image suffix": 1}
    assert count_inputs(["memory://b"], Reading()) == 3
    assert [item.path for item in read_inputs(["memory://b/*/*.png"], reading)] == ["memory:///b/dog/2.png"]


def test_an_object_that_changed_is_another_input(store: Any, photo: Photo) -> None:
    def seen() -> bytes:
        (item,) = read_inputs(["memory://b/cat/1.jpg"], Reading())
        return identity(item)

    before = seen()
    assert seen() == before
    store.pipe("/b/cat/1.jpg", photo(9) + b"x")
    assert seen() != before


def test_rows_of_what_is_fetched(store: Any, predict: Predict) -> None:
    run = predict("memory://b")
    assert (run.code, run.statuses) == (3, ["ok", "ok", "not_an_image"])
    assert run.rows[0]["path"] == "memory:///b/cat/1.jpg"


@pytest.mark.parametrize(
    ("address", "words"),
    [("memory://b/gone.jpg", "cannot be read"), ("ftp://x/a.jpg", "addresses are s3://")],
    ids=["gone", "scheme"],
)
def test_what_cannot_be_read_is_said_before_any_work(store: Any, address: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_inputs([address], Reading())


def test_https_and_http(predict: Predict, tmp_path: Path, photo: Photo) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "a.jpg").write_bytes(photo(1))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))
    ) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}"
        run = predict(f"{address}/a.jpg")
        gone = predict(f"{address}/b.jpg")
        server.shutdown()
    assert (run.statuses, run.rows[0]["path"]) == (["ok"], f"{address}/a.jpg")
    assert gone.code == 2
    assert "cannot be read" in gone.stderr


def test_an_address_in_a_table_is_not_fetched(store: Any, predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("path\nmemory://b/cat/1.jpg\n")
    run = predict(tmp_path / "x.csv")
    assert run.statuses == ["missing"]
    assert "only addresses on the command line are fetched" in run.rows[0]["error"]
