"""What an export is measured against: training's stored logits, and PyTorch's logits on the whole splits.

One pass of the network gives every classifier's logits, so exporting all targets costs one evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from export.outputs import TrainingPass
from export.sets import CalibrationImages
from export.write.onnx_graph import Normalize, forward_pass
from ffl_deploy.data.datasets import ArraySplit, ImageData, Split, load_data
from ffl_deploy.data.inputs import FILE, changed_files
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.networks.targets import exits_of
from ffl_deploy.parity import PARITY_GATES, compare, judge
from ffl_deploy.run_directory import Run
from ffl_deploy.runtime.replay import passes

if TYPE_CHECKING:
    import torch

    from ffl_deploy.networks.checkpoint import LoadedNetwork
    from ffl_deploy.networks.mutual import MutualNetwork
    from ffl_deploy.networks.quantization import QuantizedNetwork
    from ffl_deploy.networks.targets import Target


@dataclass(frozen=True)
class Reference:
    """Training's own evaluation of one classifier on held-out images."""

    images: np.ndarray  # uint8 [n, height, width, 3]
    labels: np.ndarray  # int64 [n]
    logits: np.ndarray  # float32 [n, classes]


class Evaluation:
    """PyTorch's side of the comparison for one run and checkpoint; each split is read and
    passed through once.

    loaded: the network with that checkpoint's weights; targets: the classifiers that are asked for, of a
    cascade its exits;
    reference_only: the images that training stored stand for every split.
    """

    def __init__(
        self,
        run: Run,
        loaded: LoadedNetwork,
        checkpoint: str,
        targets: Sequence[str],
        reference_only: bool = False,
    ) -> None:
        self.run, self.loaded, self.checkpoint = run, loaded, checkpoint
        self.targets = tuple(dict.fromkeys(one for name in targets for one in exits_of(name) or (name,)))
        self.reference_only = reference_only
        self.held_out = "reference" if reference_only else "test"

    @cached_property
    def data(self) -> ImageData:
        """The run's data, checked against the images that training stored. Raises UsageError, CheckError."""
        if self.reference_only:
            return self._stored()
        try:
            data = load_data(self.run.data)
        except UsageError as error:
            raise UsageError(
                f"{str(error).rstrip('.')}. Say with --data where the run's data are now, or export by the "
                "images that training stored alone, with --reference-only."
            ) from error
        if list(data.classes) != self.run.classes:
            raise CheckError(
                "the data's classes are not those of the run; give back the data that it was trained on."
            )
        require_same_inputs(self.run, data)
        rows = self.run.reference_rows()
        images, labels, _ = self.run.reference(self.checkpoint, self.targets[0])
        if (
            rows.max(initial=0) >= len(data.test)
            or not np.array_equal(data.test.read(rows), images)
            or not np.array_equal(data.test.labels[rows], labels)
        ):
            raise CheckError(
                f"the test images or labels of {self.run.config.data_name} are not those that training "
                "evaluated; accuracies on other images would say nothing about this run: give back the data "
                "that it was trained on."
            )
        return data

    def _stored(self) -> ImageData:
        """-> the images that training stored, as all three splits."""
        images, labels, _ = self.run.reference(self.checkpoint, self.targets[0])
        stored, run = ArraySplit(images, labels), self.run
        name, classes = run.config.data_name, tuple(run.classes)
        return ImageData(name, classes, run.preprocessing, run.mean, run.std, stored, stored, stored)

    @cached_property
    def test_logits(self) -> dict[str, np.ndarray]:
        """target -> float32 [n, classes] on the whole test split."""
        return classifier_logits(self.run, self.loaded.network, self.data.test, self.targets)

    @cached_property
    def validation_logits(self) -> dict[str, np.ndarray]:
        return classifier_logits(self.run, self.loaded.network, self.data.validation, self.targets)

    @cached_property
    def calibration_logits(self) -> dict[str, np.ndarray]:
        return classifier_logits(self.run, self.loaded.network, self.calibration.split, self.targets)

    @cached_property
    def quantized(self) -> QuantizedNetwork | None:
        """-> the network with the scales that it was trained with;
        None where training was not quantization-aware."""
        from ffl_deploy.networks.checkpoint import QUANTIZATION, read_checkpoint
        from ffl_deploy.networks.quantization import QuantizedNetwork

        folder = self.run.checkpoint(self.checkpoint)
        if not (folder / f"{QUANTIZATION}.safetensors").is_file():
            return None
        quantized = QuantizedNetwork(self.loaded.network)
        quantized.load(
            read_checkpoint(folder, (QUANTIZATION,)).tensors[QUANTIZATION], str(folder), as_written=True
        )
        return quantized

    @cached_property
    def calibration(self) -> CalibrationImages:
        """-> the images that promises are calibrated on: those of --calibration-split, where the run has
        any."""
        if self.data.calibration is not None:
            return CalibrationImages(self.data.calibration, "calibration")
        own = "the same images chose the epoch and the temperature; train with --calibration-split for others"
        notes = [self.run.config.split.get("note", ""), own]
        return CalibrationImages(self.data.validation, "validation", "; ".join(filter(None, notes)))

    def reference(self, target: str) -> Reference:
        """-> training's stored evaluation of `target`. Raises UsageError where there is none."""
        return Reference(*self.run.reference(self.checkpoint, target))

    def calibration_images(self, limit: int, seed: int = 0) -> np.ndarray:
        """-> at most `limit` training images uint8 [n, h, w, 3],
        equally many of each class as far as they go."""
        return self.data.train.read(class_balanced(self.data.train.labels, limit, seed))

    def training_pass(self, target: Target, limit: int) -> TrainingPass:
        """-> what `target`, BranchTarget or FusedTarget, makes of at most `limit` training images, equally
        many of each class."""
        import torch

        train, normalize = self.data.train, Normalize(self.run.mean, self.run.std)
        rows, size, found = class_balanced(train.labels, limit), self.run.preprocessing, []
        with torch.inference_mode():
            for part in passes(len(rows), size.height, size.width):
                images = torch.from_numpy(train.read(rows[part]))
                values = forward_pass(target, normalize(images), early=True)
                found.append((values.early, values.embedding, values.logits))
        early, embedding, logits = (torch.cat(column) for column in zip(*found, strict=True))
        return TrainingPass(early, embedding, logits, torch.from_numpy(train.labels[rows]))


def require_same_inputs(run: Run, data: ImageData) -> None:
    """Raises CheckError where the data are cut or sized otherwise than the run's, or their files are others:
    images that it trained on would count as held out."""
    changed = []
    split = run.config.split
    if data.preprocessing != run.preprocessing:
        changed.append(f"it is read as {data.preprocessing} and config.json says {run.preprocessing}")
    for part, counts in split["images_per_class"].items():
        images = getattr(data, part).labels
        if np.bincount(images, minlength=len(data.classes)).tolist() != counts:
            changed.append(f"it has {len(images)} {part} images, and had {sum(counts)}")
    known, now = split.get("inputs_sha256"), data.inputs
    if known is not None and now is not None and known != now.sha256:
        listed = run.folder / FILE
        changed = (changed_files(listed, now) if listed.is_file() else []) or changed or ["its files changed"]
    if changed:
        raise CheckError(
            f"{data.name} is not what {run.folder} was trained on: {', '.join(changed)}; give it "
            "back as it was, or train again."
        )


def class_balanced(labels: np.ndarray, limit: int, seed: int = 0) -> np.ndarray:
    """-> sorted rows of at most `limit` images, taken from the classes in turn;
    which ones depends on `seed`."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    rank = np.empty(len(order), dtype=np.int64)  # how many images of the same class come earlier in `order`
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    return np.sort(np.lexsort((position, rank))[:limit])


def classifier_logits(
    run: Run, network: MutualNetwork, split: Split, targets: Sequence[str]
) -> dict[str, np.ndarray]:
    """One pass over the split's images -> target -> float32 logits [n, classes]."""
    import torch

    normalize = Normalize(run.mean, run.std)
    parts: dict[str, list[np.ndarray]] = {target: [] for target in targets}
    network = network.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for part in passes(len(split), run.preprocessing.height, run.preprocessing.width):
            batch = normalize(torch.from_numpy(split.read(part)))
            outputs = network(batch.contiguous(memory_format=torch.channels_last)).classifiers()
            for target in targets:
                parts[target].append(outputs[target].numpy())
    return {target: np.concatenate(logits) for target, logits in parts.items()}


def answers_of(model: torch.nn.Module, images: np.ndarray) -> list[np.ndarray]:
    """-> what `model` gives of `images` uint8 [n, h, w, 3], each output [n, ...]."""
    import torch

    with torch.inference_mode():
        answers = [model(torch.from_numpy(images[rows])) for rows in passes(*images.shape[:3])]
    return [torch.cat(column).numpy() for column in zip(*answers, strict=True)]


def check_target(model: torch.nn.Module, reference: Reference, name: str) -> None:
    """The extracted target, still in PyTorch, must give training's stored logits. Raises CheckError."""
    logits = answers_of(model, reference.images)[0]
    verdict = judge({str(len(logits)): compare(reference.logits, logits)}, PARITY_GATES["fp32"])
    if verdict.failed:
        raise CheckError(
            f"target {name} in PyTorch does not give the logits that training stored "
            f"({verdict.findings[0]}); the checkpoint, "
            "config.json (mean, std) or eval_reference.npz was changed since training: restore them or "
            "train again."
        )
