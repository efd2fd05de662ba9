"""Bytes that somebody damaged, and names that somebody chose: a sentence, a status, a line; never a
traceback, and nothing that a terminal obeys."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.arrays import read_arrays
from ffl_deploy.bundle import Bundle
from ffl_deploy.command import printable, run_command
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.images import ImageError, decode


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_every_truncation_of_an_animation_is_a_status(form: str) -> None:
    """Whether a GIF is animated is found by looking for its second frame, which may not be there."""
    generator, buffer = np.random.default_rng(0), io.BytesIO()
    first, *others = [
        Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).quantize(16)
        for _ in range(3)
    ]
    first.save(buffer, form, save_all=True, append_images=others)
    whole = buffer.getvalue()
    assert decode(whole).animated
    codes = set()
    for end in range(len(whole)):
        try:
            decode(whole[:end])
        except ImageError as error:
            codes.add(error.code)
    assert codes <= {"empty", "not_an_image", "corrupt", "truncated"}


def test_every_flipped_bit_of_an_archive_of_arrays_is_a_sentence(tmp_path: Path) -> None:
    """In its last 22 bytes, the zip's end record, some made NumPy seek to a negative place (OSError)."""
    path = tmp_path / "arrays.npz"
    np.savez_compressed(path, images=np.zeros((2, 3), np.uint8), labels=np.arange(3))
    whole = path.read_bytes()
    refused: list[str] = []
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read_arrays(path, ("images", "labels"))
        except CheckError as error:
            refused.append(str(error))
    assert all("is damaged" in text or "holds no" in text for text in refused)
    assert len(refused) > 3 * len(whole), "half of all bits are in the arrays or say where they are"


def test_members_that_nobody_asks_for_are_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 GiB of zeros are 3 MB in a file."""
    path = tmp_path / "arrays.npz"
    np.savez_compressed(path, images=np.zeros(3), bomb=np.zeros(1000))
    read: list[str] = []
    real = np.lib.npyio.NpzFile.__getitem__

    def watched(self: object, name: str) -> np.ndarray:
        read.append(name)
        return np.asarray(real(self, name))  # type: ignore[arg-type]

    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", watched)
    assert list(read_arrays(path, ("images",), optional=("probes/0",))) == ["images"]
    assert read == ["images"]


HOSTILE = "x\x1b]0;owned\x07\x1b[2J\nall 3 signatures valid\x85\x9b31m\u202etxt.exe\r"


def test_nothing_in_a_name_is_obeyed_by_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printable(HOSTILE)
    assert shown == ("x\\x1b]0;owned\\x07\\x1b[2J\\nall 3 signatures valid\\x85\\x9b31m\\u202etxt.exe\\r")
    assert printable("Grüße \u2603 日本 👩\u200d🔬") == "Grüße \u2603 日本 👩\u200d🔬", (
        "names that people give stay"
    )

    def main(argv: object) -> int:
        raise UsageError(HOSTILE)

    assert run_command(main, []) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert said.count("\n") == 1


def test_ffl_verify_shows_a_target_as_text(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], make_bundle: object
) -> None:
    import json
    import shutil

    from ffl_deploy.verify import main

    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "t"))
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["target"] = HOSTILE
    (folder / "bundle.json").write_text(json.dumps(manifest))
    assert run_command(main, [str(folder)]) == 1  # another target than its models carry
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert (said.out + said.err).count("\n") == 1
