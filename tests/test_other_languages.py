"""docs/other-languages.md: its listings run without this package and give what its golden sample says."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.bundle import load_bundle
from ffl_deploy.images import load
from serve.server.settings import ModelSpec, Settings
from tests.serve.conftest import serve_in_thread

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/other-languages.md").read_text()
GOLDEN = json.loads((ROOT / "docs/other-languages/golden.json").read_text())
# In the listing's process this package cannot be imported, though it is installed.
ALONE = "import sys\nfor name in ('ffl_deploy', 'train', 'export', 'serve'): sys.modules[name] = None\n"


def listings(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    settings = Settings((ModelSpec("fused", ROOT / GOLDEN["bundle"]),), demo=False)
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(serve_in_thread(settings)).url


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=120).stdout


def expect(said: str) -> None:
    label, confidence = said.split()
    assert label == GOLDEN["label"]
    assert float(confidence) == pytest.approx(GOLDEN["top"][0][1], abs=1e-3)


def test_the_golden_sample_is_what_this_package_computes() -> None:
    bundle = load_bundle(ROOT / GOLDEN["bundle"])
    pixels = load(ROOT / GOLDEN["photograph"], bundle.preprocessing)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == GOLDEN["pixels"]["sha256"]
    stored = np.asarray(Image.open(ROOT / "docs/other-languages" / GOLDEN["pixels"]["png"]))
    np.testing.assert_array_equal(stored, pixels)
    assert pixels[0, 0].tolist() == GOLDEN["pixels"]["first"]
    (prediction,) = bundle.predict([pixels])
    np.testing.assert_allclose(prediction.logits, GOLDEN["logits"], atol=1e-3)
    assert bundle.classes[GOLDEN["class"]] == GOLDEN["label"] == prediction.label


def test_python_with_onnx_runtime_and_pillow_alone() -> None:
    (_, local) = listings("python")
    for photograph in (GOLDEN["photograph"], "docs/other-languages/golden.png"):
        expect(run(sys.executable, "-c", ALONE + local, GOLDEN["bundle"], photograph))
    other = ROOT / "examples/cifar100/images/orange.jpg"
    expected = load_bundle(ROOT / GOLDEN["bundle"]).predict([other])[0]
    label, confidence = run(sys.executable, "-c", ALONE + local, GOLDEN["bundle"], str(other)).split()
    assert (label, float(confidence)) == (expected.label, pytest.approx(expected.confidence, abs=1e-4))


def test_python_s_standard_library_asks_a_server(address: str) -> None:
    (client, _) = listings("python")
    expect(run(sys.executable, "-c", ALONE + client, GOLDEN["photograph"], address))


def test_node_asks_a_server(address: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    (client,) = listings("js")
    (tmp_path / "client.js").write_text(client)
    expect(run(node, str(tmp_path / "client.js"), str(ROOT / GOLDEN["photograph"]), address))


def test_the_rule_is_what_bundles_say(make_bundle: Callable[..., Any], tmp_path: Path) -> None:
    rule = json.loads((make_bundle(tmp_path / "b").folder / "bundle.json").read_text())["input"][
        "preprocessing"
    ]
    for name in ("resize", "crop_fraction", "filter"):
        assert name in rule
        assert name in PAGE
