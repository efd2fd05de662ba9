"""What uploads that broke off leave is removed, beside others that go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.demo import pieces as module
from serve.demo.pieces import Pieces


def test_a_piece_goes_once_all_that_it_can_be_of_have_ended(tmp_path: Path) -> None:
    pieces = Pieces(lambda: tmp_path)
    finished = tmp_path / "tmp_of_hash"
    finished.mkdir()
    (finished / "photo.png").write_bytes(b"x")
    broken, slow = pieces.begin(), pieces.begin()
    for name in ("tmp_broken", "tmp_slow", "other"):
        (tmp_path / name).write_bytes(b"x")
    pieces.end(broken)
    assert (tmp_path / "tmp_slow").exists()  # whose of the two it is nobody knows
    late = pieces.begin()
    (tmp_path / "tmp_late").write_bytes(b"x")
    (tmp_path / "tmp_slow").unlink()  # finished: moved to its folder
    pieces.end(slow)
    assert {path.name for path in tmp_path.iterdir()} == {"tmp_late", "other", "tmp_of_hash"}
    pieces.end(late)
    assert {path.name for path in tmp_path.iterdir()} == {"other", "tmp_of_hash"}
    assert (finished / "photo.png").exists()


def test_without_a_folder_there_is_nothing_to_remove(tmp_path: Path) -> None:
    pieces = Pieces(lambda: tmp_path / "none")
    pieces.end(pieces.begin())


def test_many_that_break_off_one_after_the_other_cost_the_same_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another one in progress all the time, they were all looked at after each: 1,300 of them 20 ms."""
    pieces, removed = Pieces(lambda: tmp_path), list[str]()
    unlink = module.os.unlink
    monkeypatch.setattr(module.os, "unlink", lambda path: (removed.append(path), unlink(path)))
    looked: list[int] = []
    look = pieces._look
    monkeypatch.setattr(pieces, "_look", lambda: (found := look(), looked.append(len(found)))[0])

    before = pieces.begin()
    for number in range(300):
        (tmp_path / f"tmp{number}").write_bytes(b"x")
        upload = pieces.begin()  # before the other one ends
        pieces.end(before)
        before = upload
        assert len(list(tmp_path.iterdir())) <= 2
    slow = pieces.begin()
    pieces.end(before)
    for number in range(300):  # beside one that lasts
        (tmp_path / f"tmp{number}").write_bytes(b"x")
        pieces.end(pieces.begin())
    pieces.end(slow)
    assert list(tmp_path.iterdir()) == []
    assert len(removed) == 600
    assert sum(looked) <= 2 * 600
