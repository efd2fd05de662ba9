"""A trained teacher whose softened answers a method's classifiers learn too (--teacher).

Any network that tells the same classes apart can teach: a run of this project, a bundle, which answers
through its own runtime, a file of weights, or the moving average of the run's own weights (mean teacher,
Tarvainen and Valpola 2017). The loss is that of Hinton et al. 2015: T^2 KL(z_k <- z_teacher), beside the
method's own. Where the training views are few the answers are computed once (features.py), else for each
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffl_deploy.bundle import load_bundle
from ffl_deploy.data.datasets import ImageData
from ffl_deploy.errors import UsageError
from ffl_deploy.files import shown
from ffl_deploy.manifest import MANIFEST
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig, Outputs
from ffl_deploy.networks.targets import build_target
from ffl_deploy.run_directory import CONFIG, load_run
from train.features import FeatureBatches, Maps, Partial
from train.looks import look_of_file
from train.loop import Trainer
from train.machine import Place
from train.methods import Method, distill
from train.weights import start_from

OWN_AVERAGE = "ema"


class TaughtOutputs(NamedTuple):
    """What the student answers, and the teacher's logits [n, classes] for the same images."""

    student: Outputs
    teacher: Tensor

    def classifiers(self) -> dict[str, Tensor]:
        return self.student.classifiers()


@dataclass(frozen=True)
class Taught(Method):
    """The losses of `method`, and weight * T^2 KL(z <- z_teacher), called prefix/NAME, for each classifier
    with weights of its own: all but the mean of the branches."""

    method: Method = field(default_factory=Method)
    prefix: str = "kd-teacher"
    weight: float = 1.0

    def losses(  # type: ignore[override]
        self, outputs: TaughtOutputs, labels: Tensor, ramp: float | Tensor
    ) -> dict[str, Tensor]:
        student, parts = outputs.student, self.method.losses(outputs.student, labels, ramp)
        for name, logits in student.classifiers().items():
            if name != "ensemble":
                parts[f"{self.prefix}/{name}"] = self.weight * distill(
                    logits, outputs.teacher, self.temperature
                )
        return parts

    def frozen(self, network: MutualNetwork, progress: float, step: int) -> list[nn.Module]:
        return self.method.frozen(network, progress, step)


def taught(method: Method, prefix: str, weight: float = 1.0) -> Taught:
    """-> `method` with a teacher beside it."""
    return Taught(
        temperature=method.temperature, strong=method.strong, method=method, prefix=prefix, weight=weight
    )


Answer = Callable[[Tensor], Tensor]
"""Pixels float [n, 3, h, w], 0..255, of any size -> logits [n, its classes]."""


@dataclass(frozen=True)
class Teacher:
    """Answers the student's images. mean, std: of the student's input, on the 0..255 scale; order: int64
    [classes], where the student's classes stand among the teacher's; on_device: whether it answers where the
    student learns, without the host."""

    answer: Answer
    mean: Tensor
    std: Tensor
    order: Tensor
    on_device: bool

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images: normalised for the student, [n, 3, h, w] -> logits [n, classes], in the student's order."""
        answers = self.answer(images.float() * self.std + self.mean).to(images.device)
        return answers.index_select(1, self.order)


def open_teacher(text: str, data: ImageData, place: Place) -> Teacher:
    """-> the teacher that --teacher names: a run, a bundle, or NAME=FILE. Raises UsageError where it is none,
    or tells other classes apart."""
    path = Path(text).expanduser()
    on_device = not (path / MANIFEST).is_file()
    if not on_device:
        classes, answer = _bundle(path)
    elif (path / CONFIG).is_file() or path.is_dir():
        classes, answer = _run(path, place)
    elif "=" in text:
        classes, answer = _file(text, data, place)
    else:
        raise UsageError(
            f"--teacher {text}: there is no such run or bundle; give one, NAME=FILE for a file of weights of "
            "the network NAME, such as timm:resnet18=FILE, or ema."
        )
    device = place.device
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (data.mean, data.std))
    order = torch.tensor(order_of(classes, data.classes, text), device=device)
    return Teacher(answer, mean, std, order, on_device)


def order_of(classes: Sequence[str], wanted: Sequence[str], text: str) -> list[int]:
    """-> where each of `wanted` stands among the teacher's `classes`. Raises UsageError where they differ."""
    if sorted(classes) != sorted(wanted):
        missing = [name for name in wanted if name not in classes]
        why = f"not {', '.join(map(repr, missing[:3]))}" if missing else "more than these"
        raise UsageError(
            f"--teacher {text} tells {len(classes):,} classes apart, {why}; it has to know the student's "
            f"{len(wanted):,} and no others: train it on the same classes."
        )
    return [list(classes).index(name) for name in wanted]


def _bundle(path: Path) -> tuple[list[str], Answer]:
    bundle = load_bundle(path)
    session, expects = bundle.session(), bundle.manifest.input.preprocessing

    def answer(pixels: Tensor) -> Tensor:
        sized = resized(pixels, expects.height, expects.width).round().clamp(0, 255).to(torch.uint8)
        given = sized.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return torch.from_numpy(session.run(given).logits)

    return bundle.manifest.classes, answer


def _run(path: Path, place: Place) -> tuple[list[str], Answer]:
    run = load_run(path)
    target = build_target(load_network(run).network, run.model.strong).to(place.device)
    size = (run.preprocessing.height, run.preprocessing.width)
    return run.classes, _network(target, size, run.mean, run.std, place)


def _file(text: str, data: ImageData, place: Place) -> tuple[list[str], Answer]:
    name, _, file = text.partition("=")
    size = (data.preprocessing.height, data.preprocessing.width)
    network = MutualNetwork(NetworkConfig((name,), len(data.classes), *size, fusion=None))
    (loaded,) = start_from(network, [file], "--teacher")
    if "heads.0.weight" not in loaded.names:
        reason = next(iter(loaded.left.values()), "it has none")
        raise UsageError(
            f"--teacher {shown(Path(file))} has no head for the {len(data.classes):,} classes of these "
            f"images ({reason}); give weights that were trained on them."
        )
    look = look_of_file(name, Path(file).expanduser())
    mean, std = (
        (data.mean, data.std)
        if look is None or look.mean is None or look.std is None
        else (tuple(255 * value for value in look.mean), tuple(255 * value for value in look.std))
    )
    target = build_target(network, "branch0").to(place.device)
    return list(data.classes), _network(target, size, mean, std, place)


def _network(
    target: nn.Module, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], place: Place
) -> Answer:
    shift, scale = (torch.tensor(values, device=place.device).view(1, 3, 1, 1) for values in (mean, std))

    def answer(pixels: Tensor) -> Tensor:
        with place.autocast():
            return target((resized(pixels, *size) - shift) / scale).float()

    return answer


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """-> `pixels` at the size that a teacher takes."""
    if pixels.shape[2:] == (height, width):
        return pixels
    return functional.interpolate(
        pixels, (height, width), mode="bilinear", antialias=True, align_corners=False
    )


class Pupil(nn.Module):
    """`student` and its teacher look at the same images; only the student learns, and holds all weights."""

    def __init__(self, student: nn.Module, teacher: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.student = student
        self.teacher = [teacher]  # in a list, or its weights would be among those that learn

    def forward(self, given: Tensor | Maps) -> TaughtOutputs:
        if isinstance(given, Maps):
            assert given.answers is not None, "what frozen stages gave was kept without the teacher's answers"
            return TaughtOutputs(self.student(given), given.answers)
        return TaughtOutputs(self.student(given), self.teacher[0](given))


@dataclass(kw_only=True)
class TaughtTrainer(Trainer):
    """Trains beside a teacher; None is the moving average of the network's own weights."""

    teacher: Teacher | None

    def __post_init__(self) -> None:
        self.method = taught(self.method, "kd-teacher", self.config.model.teacher_weight)
        super().__post_init__()

    @property
    def captures(self) -> bool:
        on_device = self.teacher is None or self.teacher.on_device
        return super().captures and on_device and not isinstance(self.batches, FeatureBatches)

    def learner(self) -> nn.Module:
        return Pupil(Partial(self.network), self.teacher or self.own_average)

    @torch.no_grad()
    def own_average(self, images: Tensor) -> Tensor:
        """images: normalised [n, 3, h, w] -> the strong classifier's logits of the moving average."""
        assert self.ema is not None
        outputs: Any = self.ema.module.eval()(images)
        return outputs.classifiers()[self.method.strong]
