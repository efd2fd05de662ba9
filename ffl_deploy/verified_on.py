"""On which processors a bundle's gates were run, and what was computed there:
what its manifest and its card say of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from ffl_deploy.markdown import table
from ffl_deploy.parity import ParityRecord


class Outcome(msgspec.Struct, frozen=True):
    """A variant on one processor. max_difference: from PyTorch's logits, in their standard deviations; null:
    not finite."""

    runtime: str  # name and version
    computed: str  # the precision
    gate: Literal["passed", "failed"]
    max_difference: float | None

    @classmethod
    def of(cls, record: ParityRecord, runtime: str, version: str, computed: str) -> Outcome:
        """-> what a comparison with PyTorch's logits found. version: of the runtime;
        its build is left out."""
        worst = record.worst
        difference = None if worst.non_finite else worst.scaled_max_diff
        return cls(
            f"{runtime} {version.split()[0].split('-')[0]}",
            computed,
            "failed" if record.verdict.failed else "passed",
            difference,
        )


class VerifiedOn(msgspec.Struct, frozen=True):
    """One processor, described by what decides its kernels and not by its name. variants: name -> outcome."""

    processor: str
    emulated: str | None  # by what
    variants: dict[str, Outcome]


def with_record(records: Sequence[VerifiedOn], new: VerifiedOn) -> list[VerifiedOn]:
    """-> `records` with `new` in the place of what was known of the same processor, or at the end."""
    key = (new.processor, new.emulated)
    return [one for one in records if (one.processor, one.emulated) != key] + [new]


def processor_table(records: Sequence[VerifiedOn]) -> str:
    """-> a table for the model card: what each processor, real or emulated, computed."""
    rows = []
    for record in records:
        name = record.processor + (f" (emulated by {record.emulated})" if record.emulated else "")
        for variant, outcome in record.variants.items():
            difference = "not finite" if outcome.max_difference is None else f"{outcome.max_difference:.1e}"
            rows.append([name, variant, outcome.runtime, outcome.computed, outcome.gate, difference])
    return table(
        ["processor", "variant", "runtime", "computed in", "gate", "max logit difference / std"], rows
    )
