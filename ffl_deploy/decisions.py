"""What a variant's answers say besides the class: which exit answered, the set, whether to abstain, whether
the image is unfamiliar. Of each only what the bundle has and was asked for; docs/decisions.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ffl_deploy.familiarity import Familiarity
from ffl_deploy.sets import SetLevel, set_labels

if TYPE_CHECKING:
    from ffl_deploy.manifest import Variant
    from ffl_deploy.runtime import Outputs


class Decisions(NamedTuple):
    """exits: a cascade's classifiers; sets: the level that was asked for; familiarity: the threshold."""

    exits: Sequence[str] = ()
    sets: SetLevel | None = None
    familiarity: Familiarity | None = None

    @classmethod
    def of(cls, variant: Variant, level: str | None = None) -> Decisions:
        """level: of its sets. Raises UsageError where the variant promises nothing of that name."""
        return cls(variant.exits, variant.sets(level) if level else None, variant.details.familiarity)

    @property
    def columns(self) -> list[str]:
        """-> the columns that rows have without being asked."""
        return ["exit"] * bool(self.exits) + ["familiarity"] * (self.familiarity is not None)

    def tensors(self, outputs: Outputs) -> dict[str, np.ndarray]:
        """-> what follows from `outputs`, by the names of the inference protocol: `set`, bool [n, classes],
        `abstain` and `unfamiliar`, bool [n]."""
        found = {}
        if self.sets is not None:
            found["set"], found["abstain"] = self.sets.answers(outputs.probabilities)
        if self.familiarity is not None and outputs.familiarity is not None:
            found["unfamiliar"] = self.familiarity.unfamiliar(outputs.familiarity)
        return found

    def each(self, outputs: Outputs, classes: Sequence[str]) -> list[dict[str, Any]]:
        """-> for each image `exit`, the classifier that answered; `set`, labels by falling confidence;
        `abstain`; `familiarity` and `unfamiliar`."""
        found: list[dict[str, Any]] = [{} for _ in outputs.logits]
        tensors = self.tensors(outputs)
        if self.exits and outputs.exit is not None:
            tensors = {"exit": outputs.exit, **tensors}
        if "unfamiliar" in tensors and outputs.familiarity is not None:
            tensors["familiarity"] = outputs.familiarity
        for name, values in tensors.items():
            for row, value in enumerate(values):
                if name == "exit":
                    found[row][name] = self.exits[value]
                elif name == "set":
                    found[row][name] = set_labels(value, outputs.probabilities[row], classes)
                else:
                    found[row][name] = value.item()
        return found
