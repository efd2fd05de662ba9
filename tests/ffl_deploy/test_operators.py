"""A model that never ends, or brings code of its own, is refused before a runtime sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffl_deploy.errors import CheckError
from ffl_deploy.runtime.operators import refuse_foreign_operators

pytest.importorskip("onnx")
from onnx import TensorProto, helper


def model(*nodes: object, functions: tuple[object, ...] = ()) -> bytes:
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, [1]) for end in ("x", "y")]
    graph = helper.make_graph(list(nodes), "graph", ends[:1], ends[1:])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions)).SerializeToString()


def loop() -> object:
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    count = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])],
        "body",
        [count, condition],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, [])],
    )
    return helper.make_node("Loop", ["n", ""], ["y"], body=body)


def test_what_never_ends_or_is_not_onnx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    identity = helper.make_node("Identity", ["x"], ["y"])
    own = helper.make_function("mine", "F", ["a"], ["b"], [identity], [helper.make_opsetid("", 18)])
    for content, words in (
        (model(loop()), "control flow Loop"),
        (
            model(helper.make_node("FusedConv", ["x"], ["y"], domain="com.microsoft")),
            "com.microsoft::FusedConv",
        ),
        (model(identity, functions=(own,)), "operators of its own"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckError, match=words):
            refuse_foreign_operators(path)
    path.write_bytes(model(identity))
    refuse_foreign_operators(path)
