"""What a graph can give beside logits and probabilities: one row for each further output.

`ffl-export` has a flag for each row, the graph, the gates and the manifest know it by its name; a session
gives it where `ffl_deploy.runtime.session.Outputs` has a field of that name. Imports no torch, so that
`--help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn


class ForwardPass(NamedTuple):
    """The values of a forward pass that an output can be made from."""

    features: Tensor  # [n, channels, height, width], of the last stage
    embedding: Tensor  # [n, channels], their spatial mean
    logits: Tensor  # [n, classes]
    classifier: nn.Linear  # embedding -> logits


@dataclass(frozen=True)
class FurtherOutput:
    """An output that is absent unless its flag asks for it.

    description: in bundle.json; of_predicted_class: it belongs to the class that the file predicts, so it is
    compared with PyTorch's where both predict the same one.
    """

    name: str
    help: str
    description: str
    compute: Callable[[ForwardPass], Tensor]
    of_predicted_class: bool = False


def _class_activation_map(values: ForwardPass) -> Tensor:
    """-> [n, height, width], whose spatial mean plus the class's bias is its logit (Zhou et al. 2016, eq.
    2)."""
    weights = values.classifier.weight[values.logits.argmax(dim=1)]
    return (weights[:, :, None, None] * values.features).sum(dim=1)


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
    )
}
