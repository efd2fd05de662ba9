"""What a run writes down about itself: its description at the start, and the test set, read once,
at the end."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

import ffl_deploy
from ffl_deploy.data.datasets import ArraySplit, ImageData
from ffl_deploy.files import existing_folder, replace_file, write_json
from ffl_deploy.networks.checkpoint import MODEL, load_weights, read_checkpoint
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from ffl_deploy.probes import PREFIX, draw, files_as_arrays, prepared
from ffl_deploy.run_directory import PREDICTIONS, REFERENCE, SCHEMA, SUMMARY, ModelRecord, RunConfig
from train.config import TrainConfig
from train.data.batches import Batches
from train.evaluate import logits_of, predictions
from train.machine import Place
from train.methods import Method
from train.options import data_spec, options_to_json
from train.state import Position

REFERENCE_IMAGES = 256
TWINS = 1000  # listed in config.json


def describe(
    config: TrainConfig, data: ImageData, network: NetworkConfig, method: Method, place: Place
) -> RunConfig:
    """-> config.json: everything that resuming and exporting need to know."""
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    if data.calibration is not None:
        parts["calibration"] = data.calibration
    counts = {
        name: np.bincount(part.labels, minlength=len(data.classes)).tolist() for name, part in parts.items()
    }
    # A file's name need not be UTF-8, JSON is.
    skipped = {
        path.encode(errors="backslashreplace").decode(): reason for path, reason in data.skipped.items()
    }
    return RunConfig(
        schema=SCHEMA,
        options=options_to_json(config),
        data=data_spec(config),
        data_name=data.name,
        classes=list(data.classes),
        preprocessing=data.preprocessing,
        mean=data.mean,
        std=data.std,
        split={
            "images_per_class": counts,
            "skipped": skipped,
            "left_out": data.left_out,
            "twins": [msgspec.to_builtins(twin) for twin in data.twins[:TWINS]],
            "inputs_sha256": None if data.inputs is None else data.inputs.sha256,
            "in_memory": isinstance(data.train, ArraySplit),
        },
        model=ModelRecord(config.model.method, method.strong, msgspec.to_builtins(network)),
        toolchain={
            "ffl_deploy": ffl_deploy.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(place.device)
            if place.device.type == "cuda"
            else platform.machine(),
            "precision": place.precision,
            "threads": str(torch.get_num_threads()),
        },
    )


def reference_logits(network: MutualNetwork, images: torch.Tensor) -> dict[str, np.ndarray]:
    """images: normalised [n, 3, h, w] on the CPU -> classifier -> logits, computed on the CPU as well.

    Export compares files with them on a CPU, in fp32: a GPU's own choice of algorithm is no part of that. The
    copy is not compiled, whatever the network is.
    """
    return logits_of(copy.deepcopy(network).cpu(), images)


def recall_of(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """predicted, labels: int64 [n] -> float64 [classes]: the share of each class's images that are told as
    it; their mean is the macro accuracy. Every class has test images."""
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    return hits / np.maximum(np.bincount(labels, minlength=classes), 1)


def never_predicted(predicted: Mapping[str, np.ndarray], classes: Sequence[str]) -> dict[str, list[str]]:
    """-> classifier -> the classes that it named for no image; of those alone that leave some out."""
    left_out = {
        name: [classes[k] for k in np.setdiff1d(np.arange(len(classes)), labels)]
        for name, labels in predicted.items()
    }
    return {name: names for name, names in left_out.items() if names}


def finish(
    folder: Path, network: MutualNetwork, batches: Batches, data: ImageData, place: Place, position: Position
) -> None:
    """Read the test set, once, with the best weights and in full precision; store predictions, accuracies,
    reference logits."""
    # the images that export compares files on: of the test set, and drawn ones
    rows = np.unique(np.linspace(0, len(data.test) - 1, REFERENCE_IMAGES).round().astype(np.int64))
    images = data.test.read(rows)
    arrays: dict[str, Any] = {"images": images, "labels": data.test.labels[rows], "indices": rows}
    files = draw(data.preprocessing)
    pictures = prepared(files, data.preprocessing)
    arrays |= files_as_arrays(files) | {f"{PREFIX}pixels": pictures}

    def normalized(pixels: np.ndarray) -> torch.Tensor:
        return batches.normalize(torch.from_numpy(pixels).to(place.device).permute(0, 3, 1, 2)).cpu()

    # the logits of each checkpoint on them
    for name in ("ema", "last", "best"):  # best comes last: the accuracies below are its own
        # The main process alone reads: its folder need not be on the others' disks.
        checkpoint = existing_folder(folder / "checkpoints" / name) if place.world.is_main else None
        if checkpoint is not None:
            load_weights(network, read_checkpoint(checkpoint, (MODEL,)).tensors[MODEL], str(checkpoint))
            for prefix, pixels in (("", images), (PREFIX, pictures)):
                arrays |= {
                    f"{prefix}{name}/{classifier}": values
                    for classifier, values in reference_logits(network, normalized(pixels)).items()
                }
    place.world.share_weights(network)

    # the whole test set with the best weights
    with place.exact() as exact:
        predicted = predictions(network, batches, "test", len(data.test), exact)
    accuracy = {name: float(np.mean(labels == data.test.labels)) for name, labels in predicted.items()}

    # the summary last: its presence says that the run is finished
    if place.world.is_main:
        with replace_file(folder / PREDICTIONS) as file:
            answers: dict[str, Any] = {"labels": data.test.labels, **predicted}
            np.savez_compressed(file, **answers)
        with replace_file(folder / REFERENCE) as file:
            np.savez_compressed(file, **arrays)
        recalls = {
            name: recall_of(labels, data.test.labels, len(data.classes)) for name, labels in predicted.items()
        }
        summary = {
            "accuracy": {name: round(value, 6) for name, value in accuracy.items()},
            # 0 where it was trained elsewhere
            "images_per_second": round(position.images / (position.seconds or math.inf), 1),
            "seconds": round(position.seconds, 1),
            "classes": list(data.classes),
            "epochs": position.epoch,
            "best_epoch": position.best_epoch,
            "best_validation_accuracy": position.best_accuracy if position.best_accuracy >= 0 else None,
            "test_images": len(data.test),
            "macro_accuracy": {name: round(float(np.mean(values)), 6) for name, values in recalls.items()},
            "recall": {
                name: dict(zip(data.classes, values.round(6).tolist(), strict=True))
                for name, values in recalls.items()
            },
            "never_predicted": never_predicted(predicted, data.classes),
        }
        write_json(folder / SUMMARY, summary)
