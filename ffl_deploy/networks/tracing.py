"""A MutualNetwork's operations as a graph, and which of its tensors are quantised:
where export puts Q/DQ pairs."""

from __future__ import annotations

import copy
import operator
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.mutual import MutualNetwork
from ffl_deploy.networks.tensor_names import Ends, tensor_names

OPERATIONS: dict[Any, str] = {
    operator.add: "Add", torch.add: "Add", "add": "Add",
    operator.mul: "Mul", torch.mul: "Mul", "mul": "Mul",
    torch.cat: "Concat", torch.concat: "Concat",
    functional.relu: "Relu", torch.relu: "Relu", "relu": "Relu", nn.ReLU: "Relu",
    functional.relu6: "Clip", functional.hardtanh: "Clip", nn.ReLU6: "Clip", nn.Hardtanh: "Clip",
    functional.max_pool2d: "MaxPool", torch.max_pool2d: "MaxPool", nn.MaxPool2d: "MaxPool",
}  # fmt: skip
"""What fx calls -> ONNX's name of it."""
JOINS = ("Add", "Concat")
"""Operations on several activations; they run in int8 where all of them and the result are quantised."""
CLIPS = ("Relu", "Clip")
"""Operations that a quantised result makes needless: rounding clips as they do."""
_IN_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}


@dataclass(frozen=True)
class Traced:
    """layers: node -> (path of the convolution or linear layer, the batch normalisation folded into it).

    members: per grid the nodes whose results are rounded to it; grids: per grid the names of these tensors.
    replaced: call_module target -> the module to call instead of the network's own.
    """

    graph: fx.Graph
    layers: dict[fx.Node, tuple[str, nn.BatchNorm2d | None]]
    members: list[list[fx.Node]]
    grids: list[list[str]]
    replaced: dict[str, nn.Module]


def trace(network: MutualNetwork) -> Traced:
    """-> the network's graph, without what does nothing in evaluation, nothing written in place.
    Raises UsageError."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        graph = fx.Tracer().trace(network)
        modules = dict(network.named_modules(remove_duplicate=False))
        replaced = _tidy(graph, modules)
        layers = _layers(graph, modules)
    except UsageError:
        raise
    # control flow that depends on values, and whatever a foreign module does with fx's proxies
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise _refusal(network, reason) from error
    finally:
        for module in training:
            module.training = True
    members = _grids(graph, modules, layers)
    named: dict[Hashable, list[str]] = {}
    ends = {path: Ends(cast(fx.Node, node.args[0]), node) for node, (path, _) in layers.items()}
    names = tensor_names(
        ends,
        lambda node: (
            list(cast(fx.Node, node).all_input_nodes) if cast(fx.Node, node).op != "get_attr" else []
        ),
        lambda node: [(_kind(user, modules), user) for user in cast(fx.Node, node).users],
    )
    for name, node in names.items():
        named.setdefault(node, []).append(name)
    # A sum far from any layer (in an attention's normalisation, say)
    # has no name that export would find it by: it stays.
    members = [nodes for nodes in members if all(node in named for node in nodes)]
    grids = [sorted({name for node in nodes for name in named[node]}) for nodes in members]
    return Traced(graph, layers, members, grids, replaced)


def _refusal(network: MutualNetwork, reason: str) -> UsageError:
    branches = ", ".join(dict.fromkeys(network.config.branches))
    return UsageError(
        f"--quantize-aware cannot follow the operations of {branches} ({reason}); leave it out: ffl-export "
        "--precision int8 then quantises by calibration."
    )


def _tidy(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Take out identities; replace what works in place, since rounding keeps its input;
    -> modules to call instead."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    replaced: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        method = node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__")
        if not (
            method
            or node.target in _IN_PLACE
            or node.kwargs.get("inplace")
            or getattr(module, "inplace", False)
        ):
            continue
        if any(order[user] > order[node] for user in node.args[0].users if user in order):
            raise ValueError(f"{node.name} overwrites what is used again later")
        if method:
            node.target = node.target[:-1]
        elif node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
        elif module is not None:
            replaced[node.target] = copy.copy(module)
            cast(Any, replaced[node.target]).inplace = False
        else:
            node.kwargs = {**node.kwargs, "inplace": False}
    return replaced


def _layers(
    graph: fx.Graph, modules: dict[str, nn.Module]
) -> dict[fx.Node, tuple[str, nn.BatchNorm2d | None]]:
    """Fold batch normalisation; -> the convolutions and linear layers.
    Raises ValueError where one is called twice."""
    found: dict[fx.Node, tuple[str, nn.BatchNorm2d | None]] = {}
    for node in list(graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        plain = isinstance(module, nn.Conv2d) and module.padding_mode == "zeros"
        if not (plain or isinstance(module, nn.Linear)) or _in_aggregator(node):
            continue
        if node.target in [path for path, _ in found.values()]:
            raise ValueError(f"{node.target} is called twice")
        norm = None
        if plain and len(node.users) == 1:
            (user,) = node.users
            norm = _batch_norm(user, node, modules)
            if norm is not None:
                user.replace_all_uses_with(node)
                graph.erase_node(user)
        found[node] = (node.target, norm)
    for node in list(graph.nodes):  # what folded batch normalisations were given
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return found


def _batch_norm(node: fx.Node, source: fx.Node, modules: dict[str, nn.Module]) -> nn.BatchNorm2d | None:
    """-> the module behind `node`, where it normalises `source` with running statistics."""
    if node.op == "call_module":
        module = modules[str(node.target)]
    elif node.target is functional.batch_norm and node.args and node.args[0] is source and len(node.args) > 1:
        statistics = node.args[1]  # of a module that was traced into, as timm's are
        if not (isinstance(statistics, fx.Node) and statistics.op == "get_attr"):
            return None
        module = modules[str(statistics.target).rpartition(".")[0]]
    else:
        return None
    return module if isinstance(module, nn.BatchNorm2d) and module.running_var is not None else None


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """-> ONNX's name of what `node` computes, "" where it has none here."""
    if node.op == "call_module":
        return OPERATIONS.get(type(modules.get(str(node.target))), "")
    return OPERATIONS.get(node.target, "") if node.op in ("call_function", "call_method") else ""


def _in_aggregator(node: fx.Node) -> bool:
    """-> whether `node` belongs to what joins the branches' logits, which stays in floating point."""
    return any(str(path).startswith("aggregator") for path in node.meta.get("nn_module_stack", ()))


def _grids(
    graph: fx.Graph, modules: dict[str, nn.Module], layers: dict[fx.Node, tuple[str, nn.BatchNorm2d | None]]
) -> list[list[fx.Node]]:
    """-> the nodes to round, those of one grid together:
    what a concatenation or a maximum takes and gives share theirs."""
    chosen: dict[fx.Node, fx.Node] = {}  # node -> another one of its grid, or itself

    def add(node: fx.Node) -> fx.Node:
        while chosen.setdefault(node, node) is not node:
            node = chosen[node]
        return node

    for node in graph.nodes:
        kind, sources = _kind(node, modules), list(_activations(node))
        if node in layers:
            add(node.args[0])
            if isinstance(modules[node.target], nn.Conv2d):
                # a linear layer's result stays in floating point: 256 levels would make ties of close classes
                add(node)
        elif kind in JOINS and len(sources) > 1 and not _in_aggregator(node):
            for source in [*sources, node]:
                add(source)
    for node in graph.nodes:
        kind, sources = _kind(node, modules), list(_activations(node))
        if kind in CLIPS and sources[0] in chosen and len(sources[0].users) == 1:
            add(node)
            chosen[node] = node if chosen[sources[0]] is sources[0] else chosen[sources[0]]
            del chosen[sources[0]]
    for node in graph.nodes:
        kind, sources = _kind(node, modules), list(_activations(node))
        if (kind == "Concat" and node in chosen) or (kind == "MaxPool" and sources[0] in chosen):
            for source in sources:
                chosen[add(source)] = add(node)
    grids: dict[fx.Node, list[fx.Node]] = {}
    for node in [node for node in graph.nodes if node in chosen]:
        grids.setdefault(add(node), []).append(node)
    return list(grids.values())


def _activations(node: fx.Node) -> Iterator[fx.Node]:
    return (source for source in node.all_input_nodes if source.op != "get_attr")
