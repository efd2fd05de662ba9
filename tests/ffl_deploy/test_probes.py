"""Made-up pictures show what the run's own images cannot: another resize, another decoder, swapped
channels."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper

from ffl_deploy import images as module
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.bundle_files import write_golden
from ffl_deploy.command import run_command
from ffl_deploy.errors import CheckError
from ffl_deploy.images import decode
from ffl_deploy.manifest import file_records, write_manifest
from ffl_deploy.preprocessing import Preprocessing
from ffl_deploy.probes import COUNT, FORMATS, LIMITS, Probes, check_pixels, draw, prepared
from ffl_deploy.verify import main

SIZES = [Preprocessing(8, 8), Preprocessing(32, 32, "stretch"), Preprocessing(224, 224, "crop", 0.875)]
OTHERS = [
    {"resize": "other"},
    {"filter": "box"},
    {"filter": "bicubic"},
    {"filter": "lanczos"},
    {"crop_fraction": 0.8},
]


def probes_of(size: Preprocessing) -> Probes:
    files = draw(size)
    return Probes(files, prepared(files, size), np.zeros((COUNT, 2), np.float32))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_pictures_are_larger_than_the_input_and_the_noise_is_not(size: Preprocessing) -> None:
    sides = [decode(file).pixels.shape[:2] for file in draw(size)]
    assert all(height > size.height and width > size.width for height, width in sides[:2])
    assert sides[0][0] < sides[0][1]
    assert sides[1][0] > sides[1][1]
    assert sides[2:] == [(size.height, size.width)] * 2
    assert draw(size) == draw(size)
    check_pixels(probes_of(size), size, "here")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_every_other_preprocessing_shows(size: Preprocessing, change: dict[str, object]) -> None:
    if change.get("resize") == "other":
        change = {"resize": "crop" if size.resize == "stretch" else "stretch"}
    if "crop_fraction" in change and size.resize == "stretch":
        pytest.skip("a stretch cuts nothing")
    with pytest.raises(CheckError, match="differs from what training was fed"):
        check_pixels(probes_of(size), msgspec.structs.replace(size, **change), "here")


def test_rounding_does_not_show() -> None:
    """One pixel in four off by one level: what another fixed-point resize may give."""
    size = SIZES[1]
    probes = probes_of(size)
    pixels = probes.pixels.copy()
    pixels[:, ::2, ::2] ^= 1
    assert 0.2 < np.abs(pixels.astype(int) - probes.pixels).mean() < min(LIMITS.values())
    check_pixels(probes._replace(pixels=pixels), size, "here")


def test_another_decoder_shows(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Pillow whose resize is another one: the logits of prepared pixels would say nothing about it."""

    real = module.prepare

    def boxed(pixels: np.ndarray, size: Preprocessing) -> np.ndarray:
        return real(pixels, msgspec.structs.replace(size, filter="box"))

    monkeypatch.setattr(module, "prepare", boxed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no verdict of the Pillow of before
    assert run_command(main, [str(tiny_bundle.folder)]) == 1
    assert f"a {FORMATS[0]} picture decoded and resized here differs" in capsys.readouterr().err
    with pytest.raises(CheckError, match="Pillow"):
        load_bundle(tiny_bundle.folder).predict([np.zeros((8, 8, 3), np.uint8)])


def test_swapped_channels_show_on_gray_data(
    make_bundle: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Gather [2, 1, 0] in front of a model whose golden images are gray: they cannot see it."""
    bundle = make_bundle(tmp_path / "gray", gray=True)
    golden = bundle.golden()
    gray = np.repeat(golden.images[..., :1], 3, axis=3)
    logits = bundle.session(check=False).run(gray).logits
    samples = golden._replace(images=gray, logits=logits)
    model = onnx.load(bundle.folder / "model.onnx")
    for node in model.graph.node:
        node.input[:] = ["swapped" if name == "images" else name for name in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 1, 0]), "order"))
    model.graph.node.insert(0, helper.make_node("Gather", ["images", "order"], ["swapped"], axis=3))
    onnx.save(model, bundle.folder / "model.onnx")

    def verified(probes: Probes | None) -> int:
        record = write_golden(bundle.folder, samples, "gray", probes)
        manifest, files = bundle.manifest, file_records(bundle.folder)
        changed = files["model.onnx"]
        variants = [msgspec.structs.replace(manifest.variants[0], sha256=changed.sha256, bytes=changed.bytes)]
        write_manifest(
            bundle.folder, msgspec.structs.replace(manifest, files=files, variants=variants, golden=record)
        )
        return run_command(main, [str(bundle.folder)])

    probes = Bundle(bundle.folder, bundle.manifest).probes()
    assert probes is not None
    assert verified(None) == 0, "gray images alone do not see it"
    assert verified(probes) == 1
    assert "max logit difference" in capsys.readouterr().err


def test_pictures_that_do_not_fit_are_a_sentence(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "tiny"))
    probes = tiny_bundle.probes()
    assert probes is not None
    record = write_golden(folder, tiny_bundle.golden(), "noise", probes._replace(pixels=probes.pixels[:, :4]))
    write_manifest(
        folder, msgspec.structs.replace(tiny_bundle.manifest, files=file_records(folder), golden=record)
    )
    with pytest.raises(CheckError, match="sample pictures"):
        load_bundle(folder).probes()
