"""Checkpoints: exact, strict, and whole at every instant."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from ffl_deploy import files
from ffl_deploy.errors import CheckError
from ffl_deploy.files import existing_folder
from ffl_deploy.networks.checkpoint import MODEL, load_weights, read_checkpoint, save_checkpoint


def layer(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(
        tmp_path / "best", {MODEL: layer().state_dict(), "optimiser": {"0.step": torch.ones(2)}}, {"epoch": 7}
    )
    return tmp_path / "best"


def test_what_is_saved_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(5).bfloat16(),
        "counter": torch.tensor(3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    save_checkpoint(tmp_path / "last", {MODEL: tensors}, {"epoch": 1, "scaler": {"scale": 2.0}})
    content = read_checkpoint(tmp_path / "last")
    assert content.state["scaler"] == {"scale": 2.0}
    for name, value in tensors.items():
        torch.testing.assert_close(content.tensors[MODEL][name], value, rtol=0, atol=0, equal_nan=True)
        assert content.tensors[MODEL][name].dtype == value.dtype


def test_tensors_that_share_storage_are_saved_each(tmp_path: Path) -> None:
    weight = torch.randn(4)
    save_checkpoint(tmp_path / "last", {MODEL: {"a": weight, "b": weight, "part": weight[:2]}}, {})
    found = read_checkpoint(tmp_path / "last").tensors[MODEL]
    assert torch.equal(found["a"], weight)
    assert torch.equal(found["b"], weight)
    assert torch.equal(found["part"], weight[:2])


def test_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_checkpoint(tmp_path / name, {MODEL: layer().state_dict()}, {"epoch": 7})
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert one == two


def test_only_the_files_asked_for_are_read(saved: Path) -> None:
    (saved / "optimiser.safetensors").unlink()
    assert set(read_checkpoint(saved, (MODEL,)).tensors) == {MODEL}
    with pytest.raises(CheckError, match="damaged"):
        read_checkpoint(saved)


@pytest.mark.parametrize("where", [0, 20, -1])
def test_a_flipped_byte_is_found(saved: Path, where: int) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CheckError, match=r"model.safetensors is damaged \(its SHA-256 differs\); use another checkpoint"
    ):
        read_checkpoint(saved)


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b'{"epoch": 1}', b'{"sha256": {"model": 1}}', b"\xff"])
def test_a_damaged_state_is_one_sentence(saved: Path, state: bytes) -> None:
    (saved / "state.json").write_bytes(state)
    with pytest.raises(CheckError, match="damaged"):
        read_checkpoint(saved, (MODEL,))


def test_a_file_with_the_right_hash_that_is_no_safetensors_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"nothing of the kind")
    state = msgspec.json.decode((saved / "state.json").read_bytes())
    state["sha256"][MODEL] = files.sha256_of(saved / "model.safetensors")
    (saved / "state.json").write_bytes(msgspec.json.encode(state))
    with pytest.raises(CheckError, match="is damaged"):
        read_checkpoint(saved, (MODEL,))


def test_loading_is_all_or_an_error_that_names_the_difference() -> None:
    own, other = layer(0), layer(1)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    complete = other.state_dict()
    wrong = {
        "0.weight missing": {name: value for name, value in complete.items() if name != "0.weight"},
        "2.bias unexpected": {**complete, "2.bias": torch.ones(1)},
        r"1.weight \(5,\) instead of \(4,\)": {**complete, "1.weight": torch.ones(5)},
    }
    for message, tensors in wrong.items():
        with pytest.raises(CheckError, match=f"somewhere belongs to another architecture .*{message}"):
            load_weights(own, tensors, "somewhere")
        assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items()), (
            "nothing half-loaded"
        )
    load_weights(own, complete, "somewhere")
    assert all(torch.equal(value, complete[name]) for name, value in own.state_dict().items())


def test_many_differences_are_counted() -> None:
    with pytest.raises(CheckError, match=r"and 4 more"):
        load_weights(layer(), {}, "somewhere")


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("survived", [0, 1])
def test_a_kill_at_either_rename_leaves_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    renames: list[tuple[Path, Path]] = []
    rename = os.rename

    def dying(source: Path, target: Path) -> None:
        if len(renames) == survived:
            raise KilledError
        renames.append((source, target))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_exchange", lambda one, other: False)  # as a file system that cannot
        patch.setattr(files.os, "rename", dying)
        with pytest.raises(KilledError):
            save_checkpoint(saved, {MODEL: layer(1).state_dict()}, {"epoch": 8})
    found = existing_folder(saved)
    assert found is not None
    assert read_checkpoint(found).state["epoch"] == 7
    save_checkpoint(saved, {MODEL: layer(1).state_dict()}, {"epoch": 9})
    assert read_checkpoint(saved).state["epoch"] == 9
    assert sorted(path.name for path in saved.parent.iterdir()) == ["best"], "the next save clears up"


def test_a_failed_write_leaves_the_old_checkpoint_and_no_rest(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(content: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ffl_deploy.networks.checkpoint.save_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(saved, {MODEL: layer(1).state_dict()}, {"epoch": 8})
    assert read_checkpoint(saved).state["epoch"] == 7
    assert sorted(path.name for path in saved.parent.iterdir()) == ["best"]


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from ffl_deploy.networks.checkpoint import save_checkpoint
for epoch in range(10**6):
    weights = {"w": torch.full((50_000,), float(epoch))}
    save_checkpoint(Path(sys.argv[1]), {"model": weights}, {"epoch": epoch})
    print(epoch, flush=True)
"""


@pytest.mark.fault
def test_killed_at_any_instant_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    for turn in range(8):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + 0.0137 * turn)
        process.send_signal(signal.SIGKILL)
        printed = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        found = existing_folder(folder)
        assert found is not None
        content = read_checkpoint(found)
        assert (content.tensors[MODEL]["w"] == content.state["epoch"]).all()
        if printed:
            assert content.state["epoch"] >= int(printed[-1])
