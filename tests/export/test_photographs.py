"""A network that starts from weights for photographs, at their size: what those were trained to see reaches
the bundle, and from there the client and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.images import load
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.preprocessing import Preprocessing
from ffl_deploy.run_directory import Run, load_run

pytestmark = pytest.mark.slow
NAME = "tf_efficientnet_lite0"  # 224 pixels, bicubic, 0.875 of the shorter side, pixels from -1 to 1


class Photographs(NamedTuple):
    folder: Path
    run: Run
    bundle: Bundle  # of branch0, which started from the weights

    @property
    def files(self) -> list[Path]:
        return sorted((self.folder / "test").rglob("*.png"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    """Photographs of 150x110 pixels, smooth as photographs are, trained on with the size of the weights."""
    import timm

    from export.cli import main as export
    from train.run import main as train

    root = tmp_path_factory.mktemp("photographs")
    draws = np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 3)):
        for label, hue in enumerate(((210, 150, 60), (60, 190, 160), (150, 90, 220))):
            (root / "images" / part / f"class{label}").mkdir(parents=True)
            for number in range(count):
                coarse = draws.uniform(0.3, 1.1, (11, 15, 1)) * np.array(hue) + draws.uniform(
                    0, 30, (11, 15, 3)
                )
                picture = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize((150, 110))
                picture.save(root / "images" / part / f"class{label}" / f"{number}.png")
    torch.manual_seed(0)
    torch.save(timm.create_model(NAME, num_classes=1000).state_dict(), root / "weights.pth")

    flags = ["--data", str(root / "images"), "--branches", f"timm:{NAME}", "--method", "vanilla"]
    flags += [
        "--weights",
        f"branch0={root / 'weights.pth'}",
        "--freeze",
        "4",
        "--head-epochs",
        "0",
        "--epochs",
        "1",
    ]
    flags += [
        "--batch-size",
        "6",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--quiet",
        "--out",
        str(root / "run"),
    ]
    assert train(flags) == 0
    assert export([str(root / "run"), "--target", "branch0", "--cam", "--out", str(root / "bundles")]) == 0
    return Photographs(root / "images", load_run(root / "run"), load_bundle(root / "bundles" / "branch0"))


def answers(photographs: Photographs, images: torch.Tensor) -> np.ndarray:
    """-> what the trained network says of normalised images, as probabilities [n, classes]."""
    network = load_network(photographs.run).network
    temperature = photographs.bundle.manifest.calibration.temperature
    with torch.inference_mode():
        return (network(images).branches[0] / temperature).softmax(dim=1).numpy()


def predicted(photographs: Photographs) -> np.ndarray:
    """-> what the bundle says of the files, in the order of the classes."""
    names = photographs.bundle.manifest.classes
    rows = [dict(one.top) for one in photographs.bundle.predict(photographs.files, top_k=len(names))]
    return np.array([[row[name] for name in names] for row in rows])


def test_a_bundle_sees_what_its_weights_were_trained_to_see(photographs: Photographs) -> None:
    wanted = Preprocessing(height=224, width=224, resize="crop", crop_fraction=0.875, filter="bicubic")
    assert photographs.run.preprocessing == wanted
    assert photographs.bundle.preprocessing == wanted
    assert photographs.run.mean == pytest.approx((127.5, 127.5, 127.5))
    assert photographs.run.std == pytest.approx((127.5, 127.5, 127.5))
    # files through the bundle alone, against the network on pixels that are normalised by hand
    pixels = np.stack([load(file, wanted) for file in photographs.files]).astype(np.float32)
    images = torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2)
    assert predicted(photographs) == pytest.approx(answers(photographs, images), abs=2e-5)


def test_a_bundle_answers_as_the_library_s_own_evaluation_does(photographs: Photographs) -> None:
    """timm's transform for these weights, not this project's; with ImageNet's statistics, which other weights
    of this network want, the answers are others."""
    from timm.data.transforms_factory import create_transform

    def said(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
        view = create_transform((3, 224, 224), interpolation="bicubic", mean=mean, std=std, crop_pct=0.875)
        images = [view(Image.open(file).convert("RGB")) for file in photographs.files]
        return answers(photographs, torch.stack(images))

    found = predicted(photographs)
    spread = float(found.std(axis=0).max())
    right = np.abs(found - said((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))).max()
    wrong = np.abs(found - said((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))).max()
    assert right < 0.1 * spread
    assert wrong > 5 * right


def test_the_map_over_a_photograph_is_of_7_by_7_and_lies_where_the_network_looks(
    photographs: Photographs,
) -> None:
    from serve.demo.answers import overlay

    bundle = photographs.bundle
    pixels = np.stack([load(file, bundle.preprocessing) for file in photographs.files[:2]])
    cam = bundle.session().run(pixels).cam
    assert cam.shape == (2, 7, 7)
    network = load_network(photographs.run).network
    with torch.inference_mode():
        outputs = network(torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2))
        weight = network.heads[0].weight[outputs.branches[0].argmax(dim=1)]
        expected = torch.einsum("nc,nchw->nhw", weight, outputs.features[0]).numpy()
    np.testing.assert_allclose(cam, expected, rtol=0, atol=1e-3 * float(np.abs(expected).max()))
    assert overlay(pixels[0], cam[0]).size == (320, 320)
