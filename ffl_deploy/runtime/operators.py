"""Which operators a bundle's model may have: those of ONNX itself that end.

The exporter writes some twenty. A loop of 2^62 rounds cannot be interrupted, since a signal waits for the
native call to return; control flow and operators that a model brings along have no place in a classifier.
"""

from __future__ import annotations

from pathlib import Path

from ffl_deploy.errors import CheckError
from ffl_deploy.runtime.onnx_wire import read_graph

DOMAINS = ("", "ai.onnx")


def refuse_foreign_operators(path: Path) -> None:
    """Raises CheckError where the ONNX file has control flow, functions of its own, or operators of another
    domain than ONNX's."""
    graph = read_graph(path)
    if graph.functions:
        raise _refused(path, "operators of its own")
    for node in graph.nodes:
        if node.subgraphs:
            raise _refused(path, f"the control flow {node.operator}")
        if node.domain not in DOMAINS:
            raise _refused(path, f"the operator {node.domain}::{node.operator}")


def _refused(path: Path, what: str) -> CheckError:
    return CheckError(
        f"{path} has {what}, which no export writes; do not use this bundle, or export it again."
    )
