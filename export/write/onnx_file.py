"""The last thing done to every ONNX file that is written: it asks of its reader what it needs, and no more.

Libraries stamp their newest IR version and every operator set they know (ONNX Runtime's quantizer: eight that
nothing uses), and a runtime refuses a number that it does not know, although it could compute the graph.
Containers for Jetson, Triton and Riva and browsers hold runtimes that old.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ffl_deploy.errors import CheckError, first_line
from ffl_deploy.files import write_atomically


def save_onnx(proto: Any, path: Path) -> None:
    """Write the ModelProto `proto` to `path`, finished and checked.
    Raises CheckError where onnx refuses it."""
    finish(proto)
    write_atomically(path, proto.SerializeToString(deterministic=True))
    check_onnx(path)


def finish(proto: Any) -> None:
    """Leave in `proto` only operator sets that it uses, and the lowest IR version that they allow.

    The metadata of nodes is younger than some of those IR versions;
    readers of any age pass over fields they do not know.
    """
    from onnx import helper

    used = {"", *used_domains(proto)}
    kept = [entry for entry in proto.opset_import if _domain(entry.domain) in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    # onnx knows the IR version of its own operator sets; a runtime's are of any.
    proto.ir_version = helper.find_min_ir_version_for(kept, ignore_unknown=True)


def used_domains(proto: Any) -> set[str]:
    """-> domains of the operators in the graph, in its subgraphs and in the model's functions;
    "" is ONNX's own."""
    functions = [node for function in proto.functions for node in function.node]
    return {_domain(node.domain) for node in all_nodes([*proto.graph.node, *functions])}


def all_nodes(nodes: Any) -> Iterator[Any]:
    """-> `nodes` and those of the graphs inside them (branches, loop bodies)."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from all_nodes(graph.node)


def check_onnx(path: Path) -> None:
    """onnx's full check (by path, with shape inference) of a saved file. Raises CheckError."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker, shape inference and protobuf each raise their own
        raise CheckError(f"onnx refuses {path.name}: {first_line(error)}") from error


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name  # two spellings of one domain
