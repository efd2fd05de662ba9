"""What of a graph is quantised, and in which parts: layers, what stands around them, attention.

Told by the graph alone: an optimiser drops what the exporter noted at the nodes.
"""

from __future__ import annotations

from typing import Any

# Without Softmax, which stays behind the logits in fp32, and data movement, which follows its neighbours.
# Sigmoid and the product behind it stay in float: between two convolutions they would round three times
# instead of once.
OPERATORS = (
    "Conv", "Gemm", "MatMul", "Add", "Concat", "Relu", "Clip", "LeakyRelu", "MaxPool", "AveragePool",
    "GlobalAveragePool", "Flatten", "Reshape", "Resize", "Pad",
)  # fmt: skip
WEIGHTED = ("Conv", "Gemm", "MatMul")


def name_nodes(proto: Any) -> None:
    """Give every node a name of its own: the quantizer tells nodes by it, and optimisers leave some empty."""
    taken = {node.name for node in proto.graph.node}
    seen: set[str] = set()
    for index, node in enumerate(proto.graph.node):
        if not node.name or node.name in seen:
            fresh = f"{node.op_type}_{index}"
            while fresh in taken:
                fresh += "_"
            node.name = fresh
            taken.add(fresh)
        seen.add(node.name)


def blocks(proto: Any) -> list[list[str]]:
    """-> the network in parts: each convolution or matrix product with what follows it up to the next one."""
    outside = set(outside_the_network(proto))
    owner: dict[str, int] = {}
    parts: list[list[str]] = []
    for node in proto.graph.node:
        if node.op_type in WEIGHTED and node.name not in outside:
            parts.append([])
            index = len(parts) - 1
        else:
            index = max((owner[name] for name in node.input if name in owner), default=-1)
        if index >= 0:
            owner |= dict.fromkeys(node.output, index)
            if node.op_type in OPERATORS and node.name not in outside:
                parts[index].append(node.name)
    return parts


def outside_the_network(proto: Any) -> list[str]:
    """-> names of the nodes that are not the network: normalisation, and what joins classifiers, follows the
    logits or leads to other outputs alone. Told by the graph: an optimiser drops what the exporter noted at
    the nodes."""
    initializers = {tensor.name for tensor in proto.graph.initializer}
    names = [node.name for node in tail(proto)[1]]
    outputs = {output.name for output in proto.graph.output} - {"logits"}
    before, behind = {"images"}, {"logits"}
    for node in proto.graph.node:
        values = set(node.input) - initializers
        if values and values <= before and node.op_type in ("Cast", "Sub", "Mul", "Div", "Transpose"):
            before |= set(node.output)
            names.append(node.name)
        if behind & set(node.input):
            behind |= set(node.output)
            names.append(node.name)
        if outputs & set(node.output):
            names.append(node.name)
    leading = leading_to(proto, "logits")
    names += [node.name for node in proto.graph.node if node.name not in leading]
    return list(dict.fromkeys(names))


def leading_to(proto: Any, output: str) -> set[str]:
    """-> names of the nodes that `output` is computed from."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    found, open_names = set(), [output]
    while open_names:
        node = makers.get(open_names.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            open_names += node.input
    return found


def tail(proto: Any) -> tuple[list[Any], list[Any]]:
    """-> (the classifiers, whose matrix products come last on the ways to the logits;
    the nodes between them and the logits).

    A mean or gate over several classifiers takes their logits as they are:
    in 256 levels close classes would become ties.
    """
    makers = {name: node for node in proto.graph.node for name in node.output}
    classifiers, between, seen, open_names = [], [], set(), ["logits"]
    while open_names:
        node = makers.get(open_names.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        # a convolution where no matrix product is the classifier
        if node.op_type in ("Gemm", "MatMul", "Conv"):
            classifiers.append(node)
        else:
            between.append(node)
            open_names += node.input
    return classifiers, between


def activation_products(proto: Any) -> list[str]:
    """-> names of the products of two activations (attention):
    neither side's 8 bits could be kept from saturating."""
    initializers = {tensor.name for tensor in proto.graph.initializer}
    weighted = [node for node in proto.graph.node if node.op_type in WEIGHTED]
    return [node.name for node in weighted if not initializers & set(node.input[1:2])]


def free_activation_products(quantized: Any, names: set[str]) -> None:
    """Let the products `names` read what was computed, not what was quantised for others.

    A neighbour's Q/DQ (of the reshape before an attention, say) would otherwise lend both sides 8 bits, and a
    runtime compute the product in them though it was excluded: through operators that only move a tensor,
    too, so these are freed as well.
    """
    from ffl_deploy.saturation import MOVES

    graph = quantized.graph
    makers = {output: node for node in graph.node for output in node.output}
    waiting = [(node, place) for node in graph.node if node.name in names for place in range(2)]
    while waiting:
        node, place = waiting.pop()
        maker = makers.get(node.input[place])
        if maker is not None and maker.op_type == "DequantizeLinear":
            source = makers.get(maker.input[0])
            if source is None or source.op_type != "QuantizeLinear":
                continue  # weights
            node.input[place] = source.input[0]
            maker = makers.get(node.input[place])
        if maker is not None and maker.op_type in MOVES:
            waiting += [
                (maker, index) for index in range(len(maker.input) if maker.op_type == "Concat" else 1)
            ]
    # What nobody reads any more goes: first the dequantisation, then what it read.
    for kind in ("DequantizeLinear", "QuantizeLinear") if names else ():
        read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        for node in [node for node in graph.node if node.op_type == kind and not read & set(node.output)]:
            graph.node.remove(node)
