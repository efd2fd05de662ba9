"""The page in a real Chromium, served as any file server does it, below a path: what it loads, keeps and
refuses.

`FFL_WEB_BUNDLES=A,B` takes these bundles, `FFL_WEB_EXAMPLES=DIR` these examples.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.web.build import WebOptions, web_models, write_web
from tests.ffl_deploy.web.browser import BROWSER, DESKTOP, PREFIX, Opened
from tests.ffl_deploy.web.pictures import write_pictures

pytestmark = BROWSER


def test_it_opens_keeps_the_gates_and_then_asks_for_nothing(
    site: Any, bundles: list[Bundle], open_page: Callable[..., Opened], tmp_path: Path
) -> None:
    opened = open_page(site.url + PREFIX)
    assert opened.ready() == "Ready. This browser keeps every gate. It works without a network from now on."
    findings = opened.page.locator("#findings li").all_inner_texts()
    for name in ("PNG", "PNG with transparency", "JPEG, turned"):
        assert any(finding.startswith(f"{name}: the same pixels as in Python") for finding in findings), (
            findings
        )
    for bundle in bundles:
        golden = len(bundle.golden().images)
        assert any(
            f"{bundle.name}: keeps the fp32 gate on {golden} golden samples" in finding
            for finding in findings
        ), findings
        assert any(f"0 of {golden} labels differ" in finding for finding in findings)

    # Everything came once: what the service worker keeps is not asked for again.
    heavy = [path for path in site.requests if path.endswith((".wasm", ".onnx"))]
    assert len(heavy) == len(set(heavy)) == 1 + len(bundles)
    asked = len(site.requests)
    (picture,) = write_pictures(tmp_path / "pictures", 1, "png")
    opened.page.set_input_files("#file", picture)
    expected = {bundle.name: bundle.predict([picture])[0].label for bundle in bundles}
    opened.says("#verdict", f"{bundles[0].name} says")
    assert {name: opened.label(name) for name in expected} == expected
    opened.page.set_input_files("#files", [picture, picture])
    opened.says("#batch-status", "2 pictures")
    opened.page.wait_for_timeout(1000)
    assert site.requests[asked:] == []


def test_it_works_without_a_network_after_the_first_visit(
    site: Any, bundles: list[Bundle], open_page: Callable[..., Opened]
) -> None:
    opened = open_page(site.url + PREFIX)
    opened.ready()
    asked = len(site.requests)
    opened.context.set_offline(True)
    opened.page.reload()
    assert "keeps every gate" in opened.ready()
    opened.page.locator("#examples button").first.click()
    opened.says("#verdict", f"{bundles[0].name} says")
    # The browser itself looks for a newer worker; nothing that the page needs is asked for.
    assert [path for path in site.requests[asked:] if not path.endswith("/sw.js")] == []


def site_copy(page_folder: Path, target: Path) -> Path:
    shutil.copytree(page_folder, target, ignore=shutil.ignore_patterns("pictures"))
    return target / "below" / "a path"


def test_a_damaged_file_is_told(
    page_folder: Path,
    serve: Callable[..., Any],
    open_page: Callable[..., Opened],
    bundles: list[Bundle],
    tmp_path: Path,
) -> None:
    page = site_copy(page_folder, tmp_path / "damaged")
    first, second = (bundle.name for bundle in bundles[:2])
    model = page / "models" / first / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 0xFF
    model.write_bytes(content)
    with serve(tmp_path / "damaged") as served:
        opened = open_page(served.url + PREFIX)
        assert "1 of 2 models do not keep their gate here" in opened.ready()
        opened.says(f"[data-model={first}]", "was changed since the page was built (SHA-256 differs)")
        opened.page.locator("#examples button").first.click()
        opened.says("#verdict", f"{second} says")  # the other one still answers


def test_a_model_that_computes_something_else_fails_its_gate(
    page_folder: Path,
    serve: Callable[..., Any],
    open_page: Callable[..., Opened],
    bundles: list[Bundle],
    tmp_path: Path,
) -> None:
    """Hashes that agree, weights that do not: as if this browser computed wrongly."""
    onnx = pytest.importorskip("onnx")
    page = site_copy(page_folder, tmp_path / "other")
    model = page / "models" / bundles[0].name / "model.onnx"
    graph = onnx.load(model)
    weights = next(one for one in graph.graph.initializer if len(one.dims) == 4)
    values = onnx.numpy_helper.to_array(weights).copy()
    values[0] *= 1.01
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(graph, model)
    records = json.loads((page / "files.json").read_text())
    name = model.relative_to(page).as_posix()
    records[name] = {"sha256": hashlib.sha256(model.read_bytes()).hexdigest(), "bytes": model.stat().st_size}
    (page / "files.json").write_text(json.dumps(records))
    with serve(tmp_path / "other") as served:
        opened = open_page(served.url + PREFIX)
        assert "1 of 2 models do not keep their gate here" in opened.ready()
        opened.says(f"[data-model={bundles[0].name}]", "does not keep its gate in this browser")
        opened.says("#findings", "max logit difference / standard deviation is")


def test_threads_where_the_headers_allow_them(
    page_folder: Path, serve: Callable[..., Any], open_page: Callable[..., Opened]
) -> None:
    headers = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
    with serve(page_folder, headers) as served:
        opened = open_page(served.url + PREFIX)
        assert "keeps every gate" in opened.ready()
        opened.says("#findings", "WebAssembly on several threads")


def test_a_new_build_replaces_the_kept_one(
    page_folder: Path, runtime_folder: Path, serve: Callable[..., Any], open_page: Callable[..., Opened],
    make_bundle: Callable[..., Bundle], tmp_path: Path,
) -> None:  # fmt: skip
    """Who comes back sees one build or the other, whole; a visit later the new one,
    also without a network."""
    page = site_copy(page_folder, tmp_path / "rebuilt")
    with serve(tmp_path / "rebuilt") as served:
        opened = open_page(served.url + PREFIX)
        opened.ready()
        other = make_bundle(tmp_path / "newer", seed=5)
        write_web(web_models([str(other.folder)]), page, WebOptions(runtime_folder))
        opened.page.reload()
        opened.ready()
        assert "not keep" not in opened.page.inner_text("#status")
        waiting = "async () => !!(await navigator.serviceWorker.getRegistration())?.waiting"
        for _ in range(120):  # wait_for_function evaluates text, which the page's policy forbids
            if opened.page.evaluate(waiting):
                break
            opened.page.wait_for_timeout(500)
        opened.page.goto("about:blank")
        opened.context.set_offline(True)
        opened.page.goto(served.url + PREFIX)
        assert "keeps every gate" in opened.ready()
        assert opened.page.title() == "newer on noise"


@pytest.mark.slow
def test_webgpu_is_offered_where_it_keeps_the_gate(
    bundles: list[Bundle],
    runtime_folder: Path,
    serve: Callable[..., Any],
    launch: Callable[..., Any],
    tmp_path: Path,
) -> None:
    write_web(
        web_models([str(bundles[0].folder)]), tmp_path / "page", WebOptions(runtime_folder, webgpu=True)
    )
    software = launch("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    with serve(tmp_path / "page") as served, contextlib.closing(software) as browser:
        opened = Opened(browser.new_context(viewport=DESKTOP), served.url)
        assert "keeps every gate" in opened.ready()
        note = opened.page.inner_text("#webgpu-note")
        choice = opened.page.locator("input[value=webgpu]")
        print(note)
        assert choice.is_enabled() == (note == "(keeps the gate here)")
        assert choice.is_enabled() or note.startswith("(not offered: ")
        if choice.is_enabled():
            choice.check()
            opened.page.locator("#examples button").first.click()
            opened.says("#verdict", "says")
            wanted = bundles[0].predict([bundles[0].golden().images[0]])[0].label
            assert opened.label(bundles[0].name) == wanted
