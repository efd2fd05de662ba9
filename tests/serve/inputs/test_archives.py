"""The bad inputs of docs/predict.md that are archives (23, 24), each by its number and name."""

from __future__ import annotations

import gzip
import io
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ffl_deploy.images import ImageError
from serve.inputs import archives, items

Predict = Callable[..., Any]
Photo = Callable[..., bytes]
DONE, SOME_FAILED = 0, 3


def test_23_hostile_archive_members_are_streamed(predict: Predict, tmp_path: Path, photo: Photo) -> None:
    names = ["../../escape.jpg", "/absolute.jpg", "good.jpg"]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            archive.writestr(name, photo(1))
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(photo(1))
            archive.addfile(info, io.BytesIO(photo(1)))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("special.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    run = predict(tmp_path / "x.zip", tmp_path / "x.tar")
    assert run.code == DONE
    assert [row["path"] for row in run.rows] == [
        f"{tmp_path}/x.{kind}::{name}" for kind in ("zip", "tar") for name in names
    ]
    assert {path for path in tmp_path.rglob("*") if "out" not in path.parts} == before, "nothing was unpacked"
    assert not (tmp_path.parent / "escape.jpg").exists()
    for skipped in ("2 symbolic links", "1 hard links", "1 special files"):
        assert skipped in run.stdout


def test_24_zip_bomb(predict: Predict, tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", b"\0" * (4 << 20))
        archive.writestr("good.jpg", photo(1))
    run = predict(tmp_path / "x.zip")
    assert run.statuses == ["too_large", "ok"]
    data = bytearray((tmp_path / "x.zip").read_bytes())
    claimed = struct.pack("<I", 4 << 20)
    while (at := data.find(claimed)) >= 0:  # the directory lies: 1000 bytes
        data[at : at + 4] = struct.pack("<I", 1000)
    (tmp_path / "lie.zip").write_bytes(data)
    assert predict(tmp_path / "lie.zip").statuses == ["corrupt", "ok"]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_24_damage_in_a_compressed_member(
    predict: Predict, tmp_path: Path, photo: Photo, method: int
) -> None:
    """Each method's library has an exception of its own."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        for name in ("one.png", "bad.png", "two.png"):
            archive.writestr(name, photo(1, "PNG"))
        start = archive.getinfo("bad.png").header_offset + 30 + len("bad.png")
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[start + 20 : start + 200] = b"\xff" * 180
    (tmp_path / "x.zip").write_bytes(data)
    assert predict(tmp_path / "x.zip").statuses == ["ok", "corrupt", "ok"]


def test_24_a_member_without_a_name(predict: Predict, tmp_path: Path, photo: Photo) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), photo(1))
        archive.writestr("good.jpg", photo(1))
    run = predict(tmp_path / "x.zip")
    assert run.statuses == ["ok"]
    assert "1 files without an image suffix" in run.stdout


def test_24_every_damaged_archive_is_rows(photo: Photo, tmp_path: Path) -> None:
    """Whatever bytes are wrong: an archive ends, and each of its items is read or says why not."""
    rng, originals = random.Random(24), []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as zipped:
            for index in range(3):
                zipped.writestr(f"{index}.png", photo(index, "PNG", size=(5, 4)))
        originals.append(("x.zip", file.getvalue()))
    for kind, format in (
        ("", tarfile.PAX_FORMAT),
        ("", tarfile.GNU_FORMAT),
        ("gz", tarfile.USTAR_FORMAT),
        ("xz", tarfile.PAX_FORMAT),
    ):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=f"w:{kind}", format=format) as tarred:
            for index in range(3):
                info = tarfile.TarInfo(f"{'long' * 8}{index}.png")
                info.size, info.mtime = len(photo(index, "PNG", size=(5, 4))), 0.5
                tarred.addfile(info, io.BytesIO(photo(index, "PNG", size=(5, 4))))
        originals.append((f"x.tar{'.' if kind else ''}{kind}", file.getvalue()))
    codes = set()
    for _ in range(1500):
        name, whole = rng.choice(originals)
        data = bytearray(whole)
        for _ in range(rng.randint(1, 10)):
            at = rng.randrange(len(data))
            data[at] = rng.choice([0, 255, 0x80, ord("9"), data[at] ^ (1 << rng.randrange(8))])
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        (tmp_path / name).write_bytes(data)
        found = [
            item.loaded() for item in archives.members(str(tmp_path / name), frozenset(), items.Skipped())
        ]
        assert len(found) < 10
        for item in found:
            try:
                item.read()
            except ImageError as error:
                codes.add(error.code)
    assert {"corrupt", "corrupt_archive", "truncated"} <= codes
    assert "internal_error" not in codes


def test_24_tar_bomb(predict: Predict, tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 1 << 20)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in (
            ("good.jpg", photo(1)),
            ("zeros.bin", b"\0" * (32 << 20)),
            ("never.jpg", photo(2)),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data.getvalue()))
    run = predict(tmp_path / "x.tar.gz")
    assert run.statuses == ["ok", "corrupt_archive"]
    assert "bomb" in run.rows[1]["error"]


def test_24_nested_encrypted_and_broken_archives(predict: Predict, tmp_path: Path, photo: Photo) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("deep.jpg", photo(1))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("inner.zip", inner.getvalue())
        archive.writestr("locked.jpg", photo(1))
        archive.writestr("good.jpg", photo(2))
    data = bytearray((tmp_path / "x.zip").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = [i for i in range(len(data)) if data.startswith(signature, i)]
        at = [i for i in at if b"locked.jpg" in data[i : i + 60]]
        data[at[-1] + offset] |= 1  # general purpose flag, bit 0: encrypted
    (tmp_path / "x.zip").write_bytes(data)
    run = predict(tmp_path / "x.zip")
    assert run.statuses == ["encrypted", "ok"]
    assert "1 nested archives" in run.stdout
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 this is no zip")
    (tmp_path / "x.tar").write_bytes(b"neither is this a tar" * 100)
    assert predict(tmp_path / "broken.zip", tmp_path / "x.tar").statuses == ["corrupt_archive"] * 2


def test_24_truncated_tar_keeps_what_came_before(predict: Predict, tmp_path: Path, photo: Photo) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("one.jpg", "two.jpg", "three.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(photo(1))
            archive.addfile(info, io.BytesIO(photo(1)))
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: data.index(b"two.jpg") + 700])
    run = predict(tmp_path / "cut.tar")
    assert run.statuses[:2] == ["ok", "truncated"]
    assert run.code == SOME_FAILED


def test_the_size_of_a_directory_is_read_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.zip"
    for limit in (zipfile.ZIP_FILECOUNT_LIMIT, 0):  # with 0, in the form of large archives
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", limit)
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(20):
                archive.writestr(f"{number}.jpg", b"x" * 100)
            archive.comment = b"PK\5 a comment"
            start = archive.fp.tell()  # type: ignore[union-attr]
        written = path.stat().st_size - start - 22 - len(archive.comment) - (0 if limit else 56 + 20)
        assert archives.directory_bytes(str(path)) == written
    path.write_bytes(b"no zip at all")
    assert archives.directory_bytes(str(path)) == 0
    record = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(b"x" * 1000 + record)
    assert archives.directory_bytes(str(path)) == 1022, "what says nothing counts whole"


def test_a_zip_that_is_all_directory_is_refused_before_it_is_read(
    predict: Predict, tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 MiB of directory took 170 MiB and 3.7 s."""
    from serve.demo import batch

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(100):
            archive.writestr(f"{number}.jpg", photo(1))
    monkeypatch.setattr(archives, "MAX_DIRECTORY_BYTES", 1000)
    monkeypatch.setattr(batch, "MAX_DIRECTORY_BYTES", 1000)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("it was read"))
    (item,) = batch.read_files([str(tmp_path / "x.zip")], items.Skipped())
    with pytest.raises(ImageError, match=r"its directory has .* bytes, more than 1000"):
        item.read()


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE])
def test_a_tar_name_of_gigabytes_is_refused_by_its_header(
    kind: bytes, predict: Predict, tmp_path: Path, photo: Photo
) -> None:
    """2.1 MB of packed zeros, said to be a name, took 4 GB before anything was said."""
    name = tarfile.TarInfo("a")
    name.type, name.size = kind, 2 << 30
    good = tarfile.TarInfo("good.jpg")
    good.size = len(photo(1))
    content = good.tobuf() + photo(1) + b"\0" * (-good.size % 512) + name.tobuf() + b"\0" * 4096
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(content))
    run = predict(tmp_path / "x.tar.gz")
    assert run.statuses == ["ok", "corrupt_archive"]
    assert "a decompression bomb" in run.rows[1]["error"]


def test_long_names_are_still_names(predict: Predict, tmp_path: Path, photo: Photo) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / f"{form}.tar", "w", format=form) as archive:
            info = tarfile.TarInfo("folder/" * 60 + "x.jpg")
            info.size = len(photo(1))
            archive.addfile(info, io.BytesIO(photo(1)))
        (row,) = predict(tmp_path / f"{form}.tar").rows
        assert (row["status"], row["path"]) == ("ok", f"{tmp_path}/{form}.tar::" + "folder/" * 60 + "x.jpg")
