"""The library's three lines: load_bundle(path).predict(images)."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffl_deploy import load_bundle
from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.images import ImageError


def test_predict_gives_the_models_own_logits(tiny_bundle: Bundle) -> None:
    golden = tiny_bundle.golden()
    predictions = load_bundle(tiny_bundle.folder).predict(list(golden.images), batch_size=3)
    assert len(predictions) == len(golden.images)
    np.testing.assert_allclose([p.logits for p in predictions], golden.logits, rtol=1e-5, atol=1e-5)
    assert [p.label_id for p in predictions] == golden.logits.argmax(axis=1).tolist()
    assert [p.label for p in predictions] == [tiny_bundle.classes[i] for i in golden.logits.argmax(axis=1)]
    exponents = np.exp(golden.logits - golden.logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(
        [p.confidence for p in predictions], (exponents / exponents.sum(1, keepdims=True)).max(1), rtol=1e-4
    )
    assert [p.top[0] for p in predictions] == [(p.label, p.confidence) for p in predictions]
    assert all(len(p.top) == 3 and p.top[0][1] >= p.top[1][1] >= p.top[2][1] for p in predictions)


def test_arrays_bytes_and_paths_of_one_image_agree(tiny_bundle: Bundle, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    first, *others = tiny_bundle.predict([pixels, path.read_bytes(), path, str(path)], top_k=2)
    assert len(first.top) == 2
    for other in others:
        assert (other.label, other.top) == (first.label, first.top)


def test_errors_name_the_image(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    with pytest.raises(ImageError, match=r"bad\.jpg") as caught:
        tiny_bundle.predict([tmp_path / "bad.jpg"])
    assert caught.value.code == "not_an_image"
    good = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ImageError, match="image 1"):
        tiny_bundle.predict([good, b""])
    for bad in (good.astype(np.float32), good[0], good[:, :, :1], np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="image 1 is"):
            tiny_bundle.predict([good, bad])
    with pytest.raises(UsageError, match="fp32"):
        tiny_bundle.predict([good], variant="fp33")
    with pytest.raises(FileNotFoundError):
        tiny_bundle.predict([tmp_path / "gone.jpg"])
    for one in ("photo.jpg", tmp_path / "bad.jpg", b"<html>"):
        with pytest.raises(ValueError, match=r"give a list: predict\(\[image\]\)"):
            tiny_bundle.predict(one)  # type: ignore[arg-type]
    for numbers in ({"top_k": 0}, {"batch_size": 0}, {"batch_size": -1}):
        with pytest.raises(ValueError, match="at least 1"):
            tiny_bundle.predict([good], **numbers)
    assert tiny_bundle.predict([]) == []


def test_an_answer_that_is_no_number_is_none(make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "nan", nonfinite_above=200.0)
    dark, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert len(bundle.predict([dark, dark])) == 2
    with pytest.raises(CheckError, match="image 3 is not a finite number"):
        bundle.predict([dark, dark, dark, white], batch_size=2)


def test_threads_share_one_session_and_agree(
    make_bundle: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    opened, real = [], bundle.session
    barrier = threading.Barrier(8)

    def session(*arguments: object) -> object:
        opened.append(arguments)
        return real()

    monkeypatch.setattr(bundle, "session", session)
    images = list(bundle.golden().images)

    def call(_: int) -> list[str]:
        barrier.wait()
        return [p.label for p in bundle.predict(images)]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(call, range(8)))
    assert answers == [answers[0]] * 8
    assert len(opened) == 1


def test_the_library_needs_no_torch(tiny_bundle: Bundle) -> None:
    script = f"""
import sys
from ffl_deploy import load_bundle
bundle = load_bundle({str(tiny_bundle.folder)!r})
assert bundle.predict(list(bundle.golden().images))[0].label in bundle.classes
heavy = ("torch", "torchvision", "scipy.stats", "sklearn", "gradio", "pyarrow", "matplotlib")
print([name for name in heavy if name in sys.modules])
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert run.stdout.strip() == "[]"


def test_an_image_of_pillow_is_taken_and_answers_can_be_read(tiny_bundle: Bundle, tmp_path: Path) -> None:
    import ffl_deploy

    exif = Image.Exif()
    exif[0x112] = 6
    pixels = np.random.default_rng(3).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    path = tmp_path / "turned.png"
    from_file, opened = tiny_bundle.predict([path, Image.open(path)])
    assert opened.logits.tobytes() == from_file.logits.tobytes()
    assert repr(opened).startswith(f"<Prediction {opened.label} ")
    assert repr(tiny_bundle).endswith("3 classes, fp32>")
    with pytest.raises(ffl_deploy.ImageError):
        tiny_bundle.predict([b"no image"])
