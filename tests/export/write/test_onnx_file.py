"""What every written file asks of its reader:
the lowest IR version and only the operator sets that are used."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from export.write.onnx_file import finish, save_onnx
from ffl_deploy.errors import CheckError

UNUSED = [helper.make_opsetid(name, 1) for name in ("com.microsoft", "ai.onnx.preview", "org.pytorch.aten")]


def model(nodes: list[onnx.NodeProto], opset: int, extra: list[onnx.OperatorSetIdProto]) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), *extra], ir_version=13)


@pytest.mark.parametrize(("opset", "version"), [(18, 8), (19, 9), (20, 9), (21, 10), (22, 10), (23, 11)])
def test_a_file_has_the_ir_version_of_its_operator_set(tmp_path: Path, opset: int, version: int) -> None:
    proto = model(
        [helper.make_node("Relu", ["x"], ["y"])], opset, [*UNUSED, helper.make_opsetid("ai.onnx.ml", 5)]
    )
    save_onnx(proto, tmp_path / "model.onnx")
    written = onnx.load(tmp_path / "model.onnx")
    assert written.ir_version == version
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", opset)]


def test_a_domain_that_only_a_branch_uses_is_kept() -> None:
    inner = helper.make_node("Gelu", ["x"], ["z"], domain="com.microsoft")
    branch = helper.make_graph(
        [inner], "branch", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])]
    )
    condition = helper.make_node(
        "Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True])
    )
    proto = model(
        [condition, helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], 20, UNUSED
    )
    finish(proto)
    assert {entry.domain for entry in proto.opset_import} == {"", "com.microsoft"}


def test_a_domain_that_only_a_function_uses_is_kept() -> None:
    node = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    function = helper.make_function(
        "own", "F", ["x"], ["y"], [node], [helper.make_opsetid("com.microsoft", 1)]
    )
    proto = model(
        [helper.make_node("F", ["x"], ["y"], domain="own")], 20, [helper.make_opsetid("own", 1), *UNUSED]
    )
    proto.functions.append(function)
    finish(proto)
    assert {entry.domain for entry in proto.opset_import} == {"", "com.microsoft", "own"}


def test_what_onnx_refuses_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"onnx refuses model\.onnx: "):
        save_onnx(model([helper.make_node("Relu", ["nowhere"], ["y"])], 20, []), tmp_path / "model.onnx")


def test_every_form_of_an_export_loads_in_old_runtimes(exported: Path) -> None:
    """Opset 20 and IR 9 are ONNX Runtime 1.17's;
    docs/export.md has what installed runtimes made of such files."""
    files = sorted((exported / "fused").glob("*.onnx"))
    assert [path.name for path in files] == ["model.int8-tensorrt.onnx", "model.int8.onnx", "model.onnx"]
    for path in files:
        proto = onnx.load(path)
        assert (proto.ir_version, [(entry.domain, entry.version) for entry in proto.opset_import]) == (
            9,
            [("", 20)],
        )
