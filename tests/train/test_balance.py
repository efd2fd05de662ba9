"""Classes of unequal size: what each is told by itself, and what gives the rare ones more weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from train.data.batches import class_weights, epoch_order
from train.finish import never_predicted, recall_of
from train.guidance import unequal_classes

LABELS = np.repeat([0, 1, 2], [60, 30, 10])


def test_recall_is_of_each_class() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 0, 1, 1, 0, 0])
    assert recall_of(predicted, labels, 3).tolist() == [0.75, 0.5, 0.0]
    found = never_predicted({"fused": predicted, "branch0": labels}, ["a", "b", "c"])
    assert found == {"fused": ["c"]}


def test_a_class_that_is_never_predicted_is_said_aloud_and_so_is_a_lower_macro_accuracy() -> None:
    summary = {
        "accuracy": {"fused": 0.92, "branch0": 0.9},
        "macro_accuracy": {"fused": 0.63, "branch0": 0.6},
        "recall": {"fused": {"a": 0.99, "b": 0.9, "c": 0.0}, "branch0": {"a": 1, "b": 1, "c": 1}},
        "never_predicted": {"fused": ["c"], "branch0": ["c"]},
        "classes": ["a", "b", "c"],
    }
    never, macro = unequal_classes(summary, np.array([0, 1, 2, 2]))
    assert never.startswith("never predicted by fused, branch0: c (2 test images)")
    assert never.endswith("they are no rarer than the others: train longer, or on more images")
    assert "--balance weights" in unequal_classes(summary, np.array([0, 0, 0, 1, 1, 1, 2]))[0]
    assert macro == (
        "each class counted alike, fused is right for 63.00 %: least for c, of which 0.0 % are told"
    )
    fair = summary | {"never_predicted": {}, "macro_accuracy": {"fused": 0.91, "branch0": 0.9}}
    assert unequal_classes(fair, np.array([0, 1, 2])) == []


def test_weights_are_one_on_average_and_equal_over_classes() -> None:
    weights = class_weights(LABELS)
    assert float(weights[LABELS].mean()) == pytest.approx(1.0)
    assert [float(weights[k] * (k == LABELS).sum()) for k in range(3)] == pytest.approx([100 / 3] * 3)


def test_sampling_draws_every_class_as_often() -> None:
    drawn = [
        np.bincount(
            LABELS[torch.cat(epoch_order(100, 10, 1, 0, epoch, class_weights(LABELS)[LABELS]))], minlength=3
        )
        for epoch in range(60)
    ]
    assert np.mean(drawn, axis=0) == pytest.approx([100 / 3] * 3, abs=3)
    assert epoch_order(100, 10, 1, 0, 1)[0].tolist() == epoch_order(100, 10, 1, 0, 1)[0].tolist()


def test_a_weighted_label_is_a_weighted_loss() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 0])
    weights = class_weights(LABELS)
    soft = functional.one_hot(labels).float() * weights[labels][:, None]
    wanted = (functional.cross_entropy(logits, labels, reduction="none") * weights[labels]).mean()
    assert float(functional.cross_entropy(logits, soft)) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("kind", ["sampling", "weights"])
def test_a_run_says_what_each_class_is_told(
    kind: str, train_tiny: Callable[..., Path], hues: Path, tmp_path: Path
) -> None:
    # a fourth class with few images
    folder = tmp_path / "unequal"
    for source in hues.rglob("*.png"):
        target = folder / source.relative_to(hues)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    for part in ("train", "test"):
        (folder / part / "grey").mkdir()
        for index in range(4):
            grey = np.full((8, 8, 3), 40 * index + 20 + (part == "test"), np.uint8)
            Image.fromarray(grey).save(folder / part / "grey" / f"{index}.png")
    run = train_tiny("run", "--data", str(folder), "--branches", "resnet8,resnet8", "--balance", kind)
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["recall"]["fused"]) == {"red", "green", "blue", "grey"}
    predicted = np.load(run / "test_predictions.npz")
    labels = predicted["labels"]
    for name, values in summary["recall"].items():
        own = [float((predicted[name][labels == k] == k).mean()) for k in range(4)]
        assert list(values.values()) == pytest.approx(own, abs=1e-6)
        assert summary["macro_accuracy"][name] == pytest.approx(np.mean(own), abs=1e-6)
