"""ffl-verify accepts what ffl-export writes and nothing that was changed since."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.errors import CheckError, OtherMachine
from ffl_deploy.files import sha256_of
from ffl_deploy.manifest import MANIFEST, file_records, write_manifest
from ffl_deploy.runtime import RUNTIMES, onnx_wire
from ffl_deploy.runtime.onnx_wire import refuse_external_data
from ffl_deploy.verify import main

Verify = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the shared bundle, to be changed."""
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    """-> (exit code, stdout, stderr) of ffl-verify; no call may end in a traceback."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = run_command(main, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


def relist(folder: Path) -> None:
    """Write the manifest anew so that it lists what the folder holds now: hashes alone then find nothing."""
    manifest = load_bundle(folder).manifest
    records = file_records(folder)
    variants = [
        msgspec.structs.replace(v, sha256=records[v.file].sha256, bytes=records[v.file].bytes)
        for v in manifest.variants
    ]
    golden = msgspec.structs.replace(manifest.golden, sha256=records[manifest.golden.file].sha256)
    write_manifest(folder, msgspec.structs.replace(manifest, files=records, variants=variants, golden=golden))


def test_an_untouched_bundle_passes(bundle: Path, verify: Verify) -> None:
    code, out, err = verify(bundle)
    assert (code, err) == (0, "")
    assert "fp32 on onnxruntime" in out
    assert "top-1 agreement 100 %" in out


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "README.md"])
def test_one_flipped_byte_in_any_file_is_found(bundle: Path, verify: Verify, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    code, _, err = verify(bundle)
    assert code == 1
    assert f"{name} was changed since export" in err


def test_an_engine_of_another_machine_is_said_not_to_have_run(
    bundle: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wrong with such a bundle, unless that variant was asked for."""
    manifest = load_bundle(bundle).manifest
    (bundle / "x.engine").write_bytes(b"native code")
    record = {"sha256": sha256_of(bundle / "x.engine"), "bytes": 11}
    engine = msgspec.structs.replace(
        manifest.variants[0], name="fp32-engine", runtime="tensorrt", file="x.engine", **record
    )
    files = {**manifest.files, **file_records(bundle)}
    write_manifest(
        bundle, msgspec.structs.replace(manifest, variants=[*manifest.variants, engine], files=files)
    )

    def elsewhere(*_: object) -> None:
        raise OtherMachine("x.engine was built for compute capability 8.9, this GPU has 9.0; rebuild it.")

    monkeypatch.setitem(RUNTIMES, "tensorrt", dataclasses.replace(RUNTIMES["tensorrt"], open=elsewhere))
    code, out, err = verify(bundle)
    assert (code, err) == (0, "")
    assert "fp32-engine: not run: x.engine was built for compute capability 8.9" in out
    code, _, err = verify(bundle, "--variant", "fp32-engine")
    assert (code, "this GPU has 9.0" in err) == (1, True)


def test_a_variant_that_is_listed_twice_is_refused(bundle: Path, verify: Verify) -> None:
    manifest = load_bundle(bundle).manifest
    write_manifest(bundle, msgspec.structs.replace(manifest, variants=manifest.variants * 2))
    code, _, err = verify(bundle)
    assert (code, "lists a variant twice" in err) == (1, True)


def test_golden_samples_of_another_type_are_refused(bundle: Path, verify: Verify) -> None:
    with np.load(bundle / "golden.npz") as arrays:
        np.savez(
            bundle / "golden.npz",
            images=arrays["images"],
            labels=arrays["labels"],
            logits=arrays["logits"].astype(str),
        )
    relist(bundle)
    code, _, err = verify(bundle)
    assert (code, "does not hold samples of this bundle" in err) == (1, True)


def test_a_graph_without_probabilities_is_refused(bundle: Path, verify: Verify) -> None:
    proto = onnx.load(bundle / "model.onnx")
    del proto.graph.output[1:]
    onnx.save(proto, bundle / "model.onnx")
    relist(bundle)
    code, _, err = verify(bundle)
    assert (code, "gives no output probabilities" in err) == (1, True)


def test_a_missing_file_is_found(bundle: Path, verify: Verify) -> None:
    (bundle / "README.md").unlink()
    code, _, err = verify(bundle)
    assert code == 1
    assert "README.md is missing" in err


@pytest.mark.parametrize("kind", ["file", "nested", "link", "linked folder"])
def test_an_extra_file_is_found(bundle: Path, verify: Verify, kind: str, tmp_path: Path) -> None:
    if kind == "file":
        (bundle / "extra.py").write_text("import os")
    elif kind == "nested":
        (bundle / "engines").mkdir()
        (bundle / "engines" / "planted.engine").write_bytes(b"native code")
    elif kind == "link":
        os.symlink("/etc/hostname", bundle / "link")
    else:
        os.symlink(tmp_path, bundle / "folder")
    code, _, err = verify(bundle)
    assert code == 1
    assert "does not list" in err


def test_a_manifest_that_leaves_the_folder_is_refused(bundle: Path, verify: Verify, tmp_path: Path) -> None:
    (tmp_path / "outside.npz").write_bytes((bundle / "golden.npz").read_bytes())
    text = (bundle / MANIFEST).read_text()
    for escape in (
        "../outside.npz",
        str(tmp_path / "outside.npz"),
        "a/../../outside.npz",
        "..\\\\outside.npz",
    ):
        (bundle / MANIFEST).write_text(text.replace("golden.npz", escape))
        code, _, err = verify(bundle)
        assert code == 1, escape
        assert "not a file inside the bundle" in err


def test_external_data_is_refused_even_where_every_hash_is_right(bundle: Path, verify: Verify) -> None:
    model = onnx.load(bundle / "model.onnx")
    onnx.save(
        model, bundle / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    relist(bundle)
    code, _, err = verify(bundle)
    assert code == 1
    assert "in another file" in err
    with pytest.raises(CheckError, match="in another file"):
        load_bundle(bundle).session()


def test_a_loop_is_refused_even_where_every_hash_is_right(bundle: Path, verify: Verify) -> None:
    """ONNX's Loop may run 2^62 rounds, and no signal ends a native call."""
    path = bundle / "model.onnx"
    model = onnx.load(path)
    condition = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    count = onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, [])
    again = onnx.helper.make_tensor_value_info("d", onnx.TensorProto.BOOL, [])
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["c"], ["d"])], "body", [count, condition], [again]
    )
    model.graph.node.append(onnx.helper.make_node("Loop", ["", ""], [], body=body, name="endless"))
    onnx.save(model, path)
    relist(bundle)
    with pytest.raises(CheckError, match="control flow Loop"):
        load_bundle(bundle).session()
    code, _, err = verify(bundle)
    assert code == 1
    assert "control flow Loop" in err


def test_external_data_is_found_wherever_a_tensor_can_hide(tmp_path: Path) -> None:
    tensor = onnx.helper.make_tensor("hidden", onnx.TensorProto.FLOAT, [1], b"\0\0\0\0", raw=True)
    inside = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
    branch = onnx.helper.make_graph([inside], "branch", [], [onnx.helper.make_tensor_value_info("y", 1, [1])])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    condition = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    graph = onnx.helper.make_graph(
        [node], "graph", [condition], [onnx.helper.make_tensor_value_info("y", 1, [1])]
    )
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    refuse_external_data(path)  # nothing external yet
    proto = onnx.load(path)
    hidden = proto.graph.node[0].attribute[1].g.node[0].attribute[0].t
    hidden.data_location = onnx.TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value="../../secret")
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(CheckError, match="'hidden' in another file"):
        refuse_external_data(path)
    # Other readers keep 32 bits of a field's tag: with a further one set this one must not see another field.
    longer = b"\xf0\x80\x80\x80\x10"  # 14 << 3 | 1 << 32
    field = onnx_wire._external_tensors(memoryview(b"\x42\x06hidden" + longer + b"\x01"), "tensor")
    with pytest.raises(ValueError, match="too large"):
        list(field)
    for cut in (1, 10, len(path.read_bytes()) - 3):
        (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(CheckError):
            refuse_external_data(tmp_path / "cut.onnx")


def test_a_model_that_answers_otherwise_fails_parity(bundle: Path, verify: Verify) -> None:
    """Every hash is right, but the golden logits are not what this model computes."""
    with np.load(bundle / "golden.npz") as arrays:
        images, labels, logits = arrays["images"], arrays["labels"], arrays["logits"].copy()
    logits[0] += np.array([0, 0.01, 0], np.float32)
    np.savez(bundle / "golden.npz", images=images, labels=labels, logits=logits)
    relist(bundle)
    code, _, err = verify(bundle)
    assert code == 1
    assert "max logit difference" in err
    assert "fp32" in err


def test_broken_manifests_and_wrong_folders(bundle: Path, verify: Verify, tmp_path: Path) -> None:
    assert verify(tmp_path / "nowhere")[0] == 2
    code, _, err = verify(tmp_path)
    assert code == 2
    assert "bundle" in err  # it names the bundle inside
    text = (bundle / MANIFEST).read_text()
    for broken, says in [
        ("{", "not a valid manifest"),
        (text.replace('"schema": 1', '"schema": 99'), "schema 99"),
    ]:
        (bundle / MANIFEST).write_text(broken)
        code, _, err = verify(bundle)
        assert code == 1
        assert says in err


def test_unknown_variant_and_runtime_name_the_known_ones(bundle: Path, verify: Verify) -> None:
    code, _, err = verify(bundle, "--variant", "fp23")
    assert (code, "Did you mean 'fp32'" in err) == (2, True)
    code, _, err = verify(bundle, "--runtime", "onnxruntim")
    assert (code, "Did you mean 'onnxruntime'" in err) == (2, True)
    code, _, err = verify(bundle, "--runtime", "onnxruntime-cuda")
    assert code == 2
    assert "CUDAExecutionProvider" in err


def test_the_hash_of_a_bundle_is_that_of_its_manifest(tiny_bundle: Bundle) -> None:
    assert tiny_bundle.sha256 == sha256_of(tiny_bundle.folder / MANIFEST)


def test_a_signature_tells_whose_bundle_it_is(
    bundle: Path, verify: Verify, tmp_path: Path, signing_keys: Callable[[str], tuple[Path, Path]]
) -> None:
    from ffl_deploy.signing import sign_bundle

    private, public = signing_keys("ours")
    code, _, err = verify(bundle, "--public-key", public)
    assert (code, "no signature" in err) == (1, True)
    assert sign_bundle(bundle, private) == tmp_path / "bundle.sig"
    assert verify(bundle, "--public-key", public)[0] == 0
    code, _, err = verify(bundle, "--public-key", signing_keys("theirs")[1])
    assert (code, "not a signature" in err) == (1, True)
    (bundle / "README.md").write_text("another card")
    relist(bundle)  # every hash is right again: only the signature knows
    assert verify(bundle)[0] == 0
    code, _, err = verify(bundle, "--public-key", public)
    assert (code, "do not use this bundle" in err) == (1, True)
    assert verify(bundle, "--public-key", tmp_path / "none")[0] == 2
    assert verify(bundle, "--public-key", private)[0] == 2
