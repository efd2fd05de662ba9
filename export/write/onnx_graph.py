"""A deployable target -> one self-contained ONNX file: uint8 pixels in, logits and probabilities out.

The exporter traces what PyTorch runs, but it has written wrong graphs in silence before (pytorch/pytorch
#169178: 0 % accuracy; #157621: a batch frozen to 1). Nothing here is trusted: export/check/gates.py compares
the saved file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.outputs import FURTHER_OUTPUTS, ForwardPass
from export.write.onnx_file import save_onnx
from ffl_deploy.errors import CheckError, UsageError, first_line

OPSET = 20
"""Default ONNX opset: what the exporter writes natively, and what ONNX Runtime,
OpenVINO and TensorRT all read."""
OPSETS = range(18, 24)
SCOPES = "pkg.torch.onnx.name_scopes"
"""The one metadata key that is kept: the module path of every node, by which a mismatch is located."""


class Normalize(nn.Module):
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w], (pixel - mean) / std;
    mean and std per channel on the 0..255 scale."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        # The cast comes first: TensorRT takes uint8 as an input, but computes nothing on it, not even a
        # transposition. Mean and std are repeated along a row of pixels: three values at a time cost ONNX
        # Runtime as much as a convolution.
        row = (images.shape[2], 3)
        return ((images.to(torch.float32) - self.mean.expand(row)) / self.std.expand(row)).permute(0, 3, 1, 2)


class DeployedModel(nn.Module):
    """What the ONNX file computes: pixels -> (logits, probabilities, and what `extras` names).

    Args: target: normalised [n, 3, h, w] -> logits [n, classes]; temperature: probabilities = softmax(logits
    / temperature) (Guo et al. 2017); extras: names of FURTHER_OUTPUTS, given in that table's order;
    constants: of those that have some, by name. Raises UsageError where extras are asked of a target with
    several classifiers.
    """

    def __init__(
        self,
        target: nn.Module,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        temperature: float = 1.0,
        extras: Sequence[str] = (),
        constants: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        if extras:
            require_features(target, extras, "this target")
        self.normalise, self.target = Normalize(mean, std), target
        self.temperature, self.extras = temperature, tuple(name for name in FURTHER_OUTPUTS if name in extras)
        self.constants = {output: tuple(values) for output, values in (constants or {}).items()}
        for output, values in (constants or {}).items():
            for name, value in values.items():
                self.register_buffer(f"{output}_{name}", value)

    @property
    def output_names(self) -> list[str]:
        return ["logits", "probabilities", *self.extras]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        normalized = self.normalise(images)
        if not self.extras:
            logits = self.target(normalized)
            return logits, torch.softmax(logits / self.temperature, dim=1)
        target: Any = self.target  # BranchTarget or FusedTarget; the constructor has looked
        traced = forward_pass(target, normalized, early=bool(self.constants))
        logits, further = traced.logits, []
        for output in self.extras:
            names = self.constants.get(output, ())
            own = traced._replace(constants={name: getattr(self, f"{output}_{name}") for name in names})
            further.append(FURTHER_OUTPUTS[output].compute(own))
        return logits, torch.softmax(logits / self.temperature, dim=1), *further

    def tracing(self, example: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any] | None, list[str]]:
        """-> (what the graph is traced with, its dynamic sizes, the inputs' names) for any batch; example:
        two images."""
        return (example,), {"images": {0: torch.export.Dim("batch", min=1, max=65536)}}, ["images"]

    def finish(self, proto: Any) -> None:
        """Change the exporter's ModelProto in place, where it could not write what is meant."""


def forward_pass(target: Any, normalized: Tensor, early: bool) -> ForwardPass:
    """-> what further outputs are made from, of normalised images [n, 3, h, w]; target: BranchTarget or
    FusedTarget; early: whether they need the earlier map too."""
    maps = target.maps(normalized) if early else None
    features = target.features(normalized) if maps is None else maps.features
    embedding = features.mean(dim=(2, 3))
    logits = target.classifier(embedding)
    pooled = maps.early.mean(dim=(2, 3)) if maps else None  # last: what follows the logits stays in fp32
    return ForwardPass(features, embedding, logits, target.classifier, pooled)


def has_features(target: nn.Module) -> bool:
    """-> whether `target` has a single feature map and classifier that further outputs could be made from."""
    return hasattr(target, "features") and hasattr(target, "classifier")


def require_features(target: nn.Module, extras: Sequence[str], name: str) -> None:
    """Raises UsageError where `target` has no single feature map and classifier
    that `extras` could be made from."""
    if not has_features(target):
        raise UsageError(
            f"--{extras[0]} needs a target with one feature map and one classifier, which {name} is not; "
            f"export it without --{extras[0]} (fused and branch0, ... can have it)."
        )


@dataclass(frozen=True)
class GraphOptions:
    """opset: ONNX operator set; batch: None is dynamic, else the only batch size that the file takes."""

    opset: int = OPSET
    batch: int | None = None


def write_onnx(
    model: DeployedModel, path: Path, height: int, width: int, options: GraphOptions, metadata: dict[str, str]
) -> None:
    """Write `model` for images of `height` x `width` to `path` and check the file;
    the same weights give the same bytes.

    Raises CheckError where a module is in training mode, the exporter fails,
    or onnx's full check refuses the file.
    """
    import onnx

    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise CheckError(
            f"{training[0]} is in training mode, so its BatchNorm would use batch statistics; call .eval() "
            "first."
        )

    # traced with two images: a batch of one would be taken for a constant
    example = torch.zeros(options.batch or 2, height, width, 3, dtype=torch.uint8)
    arguments, shapes, names = model.tracing(example)
    if options.batch:
        shapes = None
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                arguments,
                dynamo=True,
                external_data=False,
                dynamic_shapes=shapes,
                opset_version=options.opset,
                input_names=names,
                output_names=model.output_names,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = first_line(error.__cause__ or error)
        raise CheckError(
            f"PyTorch {torch.__version__} cannot export this target at opset {options.opset}: {reason}"
        ) from error
    assert program is not None

    # the same bytes on every machine
    proto = program.model_proto
    model.finish(proto)
    _strip(proto)
    onnx.helper.set_model_props(proto, metadata)
    save_onnx(proto, path)
    if {entry.domain: entry.version for entry in proto.opset_import}[""] != options.opset:
        raise CheckError(f"the exporter wrote another opset than {options.opset}; use --opset {OPSET}.")


def _strip(proto: object) -> None:
    """Remove stack traces (absolute source paths) and whatever else differs between machines; keep SCOPES."""
    from onnx import ModelProto

    assert isinstance(proto, ModelProto)
    graph = proto.graph
    for node in graph.node:
        kept = [(entry.key, entry.value) for entry in node.metadata_props if entry.key == SCOPES]
        del node.metadata_props[:]
        for key, value in kept:
            node.metadata_props.add(key=key, value=value)
        node.doc_string = ""
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        for value in values:
            del value.metadata_props[:]
            value.doc_string = ""
    del graph.metadata_props[:]
    # the build tag names the CUDA it was built for, not what it did
    proto.producer_version = torch.__version__.split("+")[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress prints and advice off the user's terminal; its exceptions pass."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
