"""What a graph can give beside logits and probabilities: one row for each further output.

`ffl-export` has a flag for each row, the graph, the gates and the manifest know it by its name; a session
gives it where `ffl_deploy.runtime.session.Outputs` has a field of that name. Imports no torch, so that
`--help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from export.outputs.familiarity import familiarity, fitted

if TYPE_CHECKING:
    from torch import Tensor, nn


class ForwardPass(NamedTuple):
    """The values of a forward pass that an output can be made from."""

    features: Tensor  # [n, channels, height, width], of the last stage
    embedding: Tensor  # [n, channels], their spatial mean
    logits: Tensor  # [n, classes]
    classifier: nn.Linear  # embedding -> logits
    early: Tensor | None = None  # [n, channels], pooled before the first branch's last stage
    constants: Mapping[str, Tensor] = MappingProxyType({})  # what the output's `fit` gave


class TrainingPass(NamedTuple):
    """What the constants of an output are fitted to: values of n training images."""

    early: Tensor  # as of ForwardPass
    embedding: Tensor
    logits: Tensor
    labels: Tensor  # int64 [n]


@dataclass(frozen=True)
class FurtherOutput:
    """An output that is absent unless its flag asks for it.

    description: in bundle.json; of_predicted_class: it belongs to the class that the file predicts, so it is
    compared with PyTorch's where both predict the same one. fit: training images -> constants of the
    graph, which `compute` finds in its ForwardPass, as it does `early`.
    """

    name: str
    help: str
    description: str
    compute: Callable[[ForwardPass], Tensor]
    of_predicted_class: bool = False
    fit: Callable[[TrainingPass], dict[str, Tensor]] | None = None


def _class_activation_map(values: ForwardPass) -> Tensor:
    """-> [n, height, width], whose spatial mean plus the class's bias is its logit (Zhou et al. 2016, eq.
    2)."""
    weights = values.classifier.weight[values.logits.argmax(dim=1)]
    return (weights[:, :, None, None] * values.features).sum(dim=1)


def _familiarity(values: ForwardPass) -> Tensor:
    assert values.early is not None
    return familiarity(values.early, values.logits, values.constants)


FAMILIARITY = "familiarity"
FURTHER_OUTPUTS = {
    row.name: row
    for row in (
        FurtherOutput(
            "cam",
            "the class activation map of the predicted class",
            "class activation map of the predicted class, in logits per position",
            _class_activation_map,
            of_predicted_class=True,
        ),
        FurtherOutput(
            "embedding",
            "the pooled features",
            "pooled features, which the classifier takes",
            lambda values: values.embedding,
        ),
        FurtherOutput(
            FAMILIARITY,
            "how much an image is like the training images, with a threshold below which it is unfamiliar",
            "likeness to the training images, 0 on average; less is stranger",
            _familiarity,
            fit=lambda training: fitted(training.early, training.logits, training.labels),
        ),
    )
}
