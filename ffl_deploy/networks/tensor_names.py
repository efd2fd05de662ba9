"""Names for the tensors of a network that its layers give them,
the same in PyTorch's graph and in an ONNX file's.

`trunk.1.0.conv1>` is what that layer gives, `trunk.1.0.conv1<` what it takes, `fusion.depthwise<1` the second
of the tensors that its input was made from, `trunk.1.0.conv2>Add>Relu` what became of a layer's output. A
tensor has several names; that one file has more consumers of it, or fewer, costs it some of them only. No
torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)
DEPTH = 3
"""Operations between a layer and a tensor that is still named by it."""
KINDS = ("Add", "Concat", "Relu", "Clip", "MaxPool")
"""Operations, by their ONNX name, that are followed from a layer on."""


class Ends(NamedTuple):
    """The tensor that a layer takes, and the one that it gives."""

    taken: Hashable
    given: Hashable


def tensor_names(
    layers: Mapping[str, Ends],
    made_from: Callable[[Hashable], Sequence[Hashable]],
    consumers: Callable[[Hashable], Iterable[tuple[str, Hashable]]],
) -> dict[str, Hashable]:
    """-> name -> tensor.

    Args: layers: path of each convolution and linear layer -> its ends; made_from: tensor -> the activations
    that its operation takes, in order; consumers: tensor -> (kind, output) of the operations that take it.
    """
    names: dict[str, Hashable] = {}
    given = {ends.given for ends in layers.values()}

    def backwards(name: str, tensor: Hashable, depth: int) -> None:
        names[name] = tensor
        if tensor in given or depth == DEPTH:
            return
        for index, source in enumerate(made_from(tensor)):
            backwards(f"{name}{'.' if depth else ''}{index}", source, depth + 1)

    def forwards(name: str, tensor: Hashable, depth: int) -> None:
        names[name] = tensor
        if depth == DEPTH:
            return
        outputs: dict[str, list[Hashable]] = {}
        for kind, output in consumers(tensor):
            if kind in KINDS:
                outputs.setdefault(kind, []).append(output)
        for kind, found in outputs.items():
            if len(found) == 1:  # of two, neither could be told from the other
                forwards(f"{name}{'>' if depth else ''}{kind}", found[0], depth + 1)

    for path, ends in layers.items():
        backwards(f"{path}<", ends.taken, 0)
        forwards(f"{path}>", ends.given, 0)
    return names
