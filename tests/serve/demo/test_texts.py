"""What the page says of a bundle that is replaced while the server runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ffl_deploy.bundle import Bundle
from serve.server.offline import SILENCE
from serve.server.settings import ModelSpec, Settings


def test_who_opens_the_page_after_a_bundle_was_replaced_reads_of_the_new_one(
    make_bundle: Callable[..., Bundle],
    start_server: Any,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in SILENCE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads") / "gradio"))
    old = make_bundle(tmp_path / "served" / "cats").folder
    other = make_bundle(tmp_path / "served" / "others", seed=1, card="# The other's card").folder
    models = (ModelSpec("cats", old), ModelSpec("others", other))
    with start_server(Settings(models, model_control=True)) as running:
        page = httpx.get(running.url).text
        assert "cat, dog, frog." in page
        assert "# The other's card" in page.replace("\\u0027", "'").replace("&#x27;", "'")

        # as an exporter leaves it: other classes, another card, another variant beside
        new = make_bundle(
            tmp_path / "new",
            classes=("cat", "dog", "owl", "<b>"),
            seed=5,
            variants=("fp32", "zebra"),
            card="# A card of 2027",
        )
        shutil.rmtree(old)
        shutil.move(new.folder, old)
        load = httpx.post(f"{running.url}/v2/repository/models/cats/load")
        assert load.status_code == 200, load.text
        page = httpx.get(running.url).text
        assert "# A card of 2027" in page
        assert "# A bundle" not in page
        assert "cat, dog, owl, \\u0026lt;b\\u0026gt;." in page or "cat, dog, owl, &lt;b&gt;." in page
        assert "zebra" in page  # in the table of variants
        assert "The other" in page
        assert not [record for record in caplog.records if "could not be renewed" in record.message]

        # what is unloaded says so, once something is loaded again
        httpx.post(f"{running.url}/v2/repository/models/others/unload")
        httpx.post(f"{running.url}/v2/repository/models/cats/load")
        page = httpx.get(running.url).text
        assert "This model is unloaded." in page
        assert "The other" not in page
