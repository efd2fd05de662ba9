"""A run that several machines share: what its parts hold, and that put together they are the whole run."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.command import run_command
from serve.predict import shards
from serve.predict.command import main
from serve.predict.parts import Part

Predict = Callable[..., Any]
Photo = Callable[..., bytes]
# of the whole run; a part has them by itself, but for the small shards
FLAGS = ("--batch-size", "4", "--shard-size", "4", "--threads", "1")
TIMES = (
    "out", "seconds", "images_per_second", "decode_share", "infer_share", "decode_ms_per_image",
    "infer_ms_per_batch", "settings",
)  # fmt: skip


@pytest.fixture
def labelled(tmp_path: Path, photo: Photo, tiny_bundle: Bundle) -> Path:
    """23 files in two folders of classes, one of them no image, and something that is no input."""
    root = tmp_path / "in"
    for index in range(23):
        folder = root / tiny_bundle.classes[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{index:02d}, "odd".jpg').write_bytes(photo(index, size=(24, 20)))
    (root / tiny_bundle.classes[1] / "bad.jpg").write_bytes(b"no image")
    (root / "notes.txt").write_text("not an input")
    return root


def make_parts(
    predict: Predict, inputs: object, suffix: str, of: int = 3, flags: Sequence[str] = FLAGS
) -> list[Path]:
    made = []
    for number in range(1, of + 1):
        run = predict(inputs, flags=[*flags, "--part", f"{number}/{of}"], out=f"part{number}{suffix}")
        assert run.code in (0, 3), run.stderr
        made.append(Path(run.out))
    return made


def merge(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """-> (exit code, standard output, standard error) of `ffl-predict merge`."""
    capfd.readouterr()
    code = run_command(main, ["merge", *map(str, words)])
    return code, *capfd.readouterr()


def beside(out: Path, what: str) -> Any:
    return json.loads(out.with_name(f"{out.name}.{what}.json").read_text())


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_merged_parts_have_the_bytes_of_the_whole_run(
    predict: Predict, labelled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str
) -> None:
    flags = [*FLAGS, "--top-k", "2", "--logits"]
    whole = predict(labelled, flags=flags, out=f"whole{suffix}")
    parts = make_parts(predict, labelled, suffix, flags=flags)
    merged = tmp_path / f"merged{suffix}"
    code, told, _ = merge(capfd, *reversed(parts), "--out", merged)
    assert code == whole.code == 3
    assert merged.read_bytes() == whole.out.read_bytes()
    assert beside(merged, "report") == beside(whole.out, "report")
    assert merged.with_name(f"{merged.name}.report.png").is_file()
    found, expected = beside(merged, "summary"), beside(whole.out, "summary")
    assert found["rows"] == 24
    assert found["skipped"] == {"files without an image suffix": 1}
    assert list(found["labels"]) == list(expected["labels"])  # their order too
    assert {k: v for k, v in found.items() if k not in TIMES} == {
        k: v for k, v in expected.items() if k not in TIMES
    }
    assert "24 rows in" in told
    assert "accuracy" in told


def test_parts_are_disjoint_and_every_other_shard(predict: Predict, labelled: Path) -> None:
    whole = [row["path"] for row in predict(labelled, flags=FLAGS).rows]
    first, second = (
        [json.loads(line)["path"] for line in part.read_text().splitlines()]
        for part in make_parts(predict, labelled, ".jsonl", of=2)
    )
    assert first == whole[0:4] + whole[8:12] + whole[16:20]
    assert second == whole[4:8] + whole[12:16] + whole[20:24]


@pytest.mark.parametrize("total", [0, 1, 4, 9, 12, 23])
def test_a_part_knows_how_many_items_it_has(total: int) -> None:
    shards_of = [range(start, min(start + 4, total)) for start in range(0, total, 4)]
    for number in (1, 2, 3):
        part = Part(number, 3)
        mine = [index for index in range(len(shards_of)) if part.owns(index)]
        assert part.items_of(total, 4) == sum(len(shards_of[index]) for index in mine)
        for index in range(7):
            assert part.next_from(index) == next(n for n in range(index, 99) if part.owns(n))


def test_members_of_an_archive_are_shared_too(
    predict: Predict, labelled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(labelled, "in")
    whole = predict(tmp_path / "all.tar", flags=FLAGS, out="whole.csv")
    parts = make_parts(predict, tmp_path / "all.tar", ".csv")
    assert merge(capfd, *parts, "--out", tmp_path / "merged.csv")[0] == 3
    assert (tmp_path / "merged.csv").read_bytes() == whole.out.read_bytes()


def test_more_parts_than_shards_are_empty_files_that_merge(
    predict: Predict, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = predict(folder, flags=["--threads", "1"], out="whole.parquet")
    parts = make_parts(predict, folder, ".parquet", of=2, flags=())
    run = predict(folder, flags=["--part", "2/2"], out="part2.parquet")
    assert "part 2/2 is empty, as 3 inputs are too few" in run.stderr
    assert beside(parts[1], "summary")["rows"] == 0
    assert merge(capfd, *parts, "--out", tmp_path / "merged.parquet")[0] == 0
    assert (tmp_path / "merged.parquet").read_bytes() == whole.out.read_bytes()


def test_a_part_is_resumed_and_only_as_that_part(
    predict: Predict,
    labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole = predict(labelled, flags=FLAGS, out="whole.jsonl")
    real, done = shards.ShardsFolder.commit, []

    def failing(self: Any, *arguments: Any) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(arguments[0])
        real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardsFolder, "commit", failing)
        run = predict(labelled, flags=[*FLAGS, "--part", "2/3"], out="part2.jsonl")
    assert (run.code, done) == (130, [1])

    # unfinished it is no part yet, and no other part may go on with it
    code, _, said = merge(capfd, run.out, "--out", tmp_path / "merged.jsonl")
    assert code == 2
    assert "is not finished; run its command again with --resume" in said
    for other, stored in (["--part", "1/3"], "1/3"), ([], "none"):
        refused = predict(labelled, flags=[*FLAGS, *other, "--resume"], out="part2.jsonl")
        assert (refused.code, f"part = 2/3, not {stored}" in refused.stderr) == (2, True), refused.stderr

    resumed = predict(labelled, flags=[*FLAGS, "--part", "2/3", "--resume"], out="part2.jsonl")
    assert resumed.code in (0, 3)
    assert beside(resumed.out, "summary")["resumed_rows"] == 4
    again = predict(labelled, flags=[*FLAGS, "--part", "2/3", "--resume"], out="part2.jsonl")
    assert (again.code, "already complete" in again.stdout) == (resumed.code, True)
    others = [predict(labelled, flags=[*FLAGS, "--part", f"{n}/3"], out=f"part{n}.jsonl").out for n in (1, 3)]
    assert merge(capfd, *others, resumed.out, "--out", tmp_path / "merged.jsonl")[0] == 3
    assert (tmp_path / "merged.jsonl").read_bytes() == whole.out.read_bytes()


def test_what_is_no_whole_run_is_refused_in_one_sentence(
    predict: Predict, labelled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two, three = make_parts(predict, labelled, ".jsonl")
    other = predict(labelled, flags=[*FLAGS, "--part", "2/3", "--top-k", "1"], out="other.jsonl").out
    batches = [*FLAGS[2:], "--batch-size", "2", "--part", "2/3"]
    batched = predict(labelled, flags=batches, out="batched.jsonl").out
    fifth = predict(labelled, flags=[*FLAGS, "--part", "2/5"], out="fifth.jsonl").out
    shutil.copy(two, tmp_path / "alone.jsonl")
    changed, broken = tmp_path / "changed.jsonl", tmp_path / "broken.jsonl"
    for copy in (changed, broken):
        shutil.copy(two, copy)
        shutil.copy(f"{two}.part.json", f"{copy}.part.json")
    changed.write_bytes(changed.read_bytes()[:-10])
    Path(f"{broken}.part.json").write_text("{}")
    for files, sentence in (
        ([one, three], "a part is missing (2/3)"),
        ([two], "2 parts are missing (1/3, 3/3)"),
        ([one, two, two, three], "are both part 2/3"),
        ([one, other, three], "different runs: top_k is 1 and 5"),
        ([one, batched, three], "different runs: batch_size is 2 and 4"),
        ([one, fifth, three], "different runs: the number of parts is 5 and 3"),
        ([one, tmp_path / "alone.jsonl", three], "has no alone.jsonl.part.json beside it"),
        ([one, changed, three], "was changed since its part was finished, or not copied whole"),
        ([one, broken, three], "is not what --part writes"),
        ([one, tmp_path / "gone.jsonl", three], "there is no file"),
    ):
        code, told, said = merge(capfd, *files, "--out", tmp_path / "merged.jsonl")
        assert (code, told, said.count("\n")) == (2, "", 1), said
        assert sentence in said
        assert not (tmp_path / "merged.jsonl").exists()

    # nor does the result replace a part, or what an unfinished run is about to write
    code, _, said = merge(capfd, one, two, three, "--out", one)
    assert (code, "would replace a part" in said) == (2, True)
    (tmp_path / "merged.jsonl.parts").mkdir()
    code, _, said = merge(capfd, one, two, three, "--out", tmp_path / "merged.jsonl")
    assert (code, "an unfinished run is about to write" in said) == (2, True)
    notes = tmp_path / "notes.csv"
    notes.write_text("mine")
    code, _, said = merge(capfd, one, two, three, "--out", notes)
    assert (code, "notes.csv is there already" in said, notes.read_text()) == (2, True, "mine")


def test_a_part_of_another_list_of_inputs_is_refused(
    predict: Predict, labelled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A machine whose folder holds other files; times of files may differ, as after a copy."""
    first = predict(labelled, flags=[*FLAGS, "--part", "1/2"], out="one.csv").out
    for file in labelled.rglob("*.jpg"):
        file.touch()
    second = predict(labelled, flags=[*FLAGS, "--part", "2/2"], out="two.csv").out
    assert merge(capfd, first, second, "--out", tmp_path / "merged.csv")[0] == 3
    last = sorted(labelled.rglob("*.jpg"))[-1]
    last.rename(last.with_name("zzz.jpg"))
    second = predict(labelled, flags=[*FLAGS, "--part", "2/2"], out="two.csv").out
    code, _, said = merge(capfd, first, second, "--out", tmp_path / "merged.csv")
    assert (code, "the inputs have other names" in said) == (2, True)
    (last.parent / "zzzz.jpg").write_bytes(b"")
    second = predict(labelled, flags=[*FLAGS, "--part", "2/2"], out="two.csv").out
    code, _, said = merge(capfd, first, second, "--out", tmp_path / "merged.csv")
    assert (code, "the number of inputs is 25 and 24" in said) == (2, True)


@pytest.mark.parametrize("text", ["0/3", "4/3", "2", "2/", "a/b", "-1/3", "1/0", "1/9999999"])
def test_what_is_no_part_is_one_sentence(predict: Predict, folder: Path, text: str) -> None:
    run = predict(folder, flags=[f"--part={text}"])
    assert (run.code, run.stderr.count("\n")) == (2, 1)
    assert f"'{text}' is not I/N with I from 1 to N, as in 2/3" in run.stderr


def test_parts_are_for_a_file_and_one_variant(
    predict: Predict, folder: Path, tiny_bundle: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert run_command(main, [str(tiny_bundle.folder), str(folder), "--part", "1/2"]) == 2
    assert "give them a file with --out" in capfd.readouterr().err
    run = predict(folder, flags=["--part", "1/2", "--variant", "auto"])
    assert (run.code, "name one beside --part" in run.stderr) == (2, True)


def test_every_machine_chooses_the_same_settings(
    predict: Predict, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.predict import tuning

    chosen = []
    for cores in (1, 64):
        monkeypatch.setattr(tuning, "available_cores", lambda cores=cores: cores)
        chosen.append(beside(predict(folder, flags=["--part", "1/2"]).out, "summary")["settings"])
    assert [one["streams"] for one in chosen] == [1, 64]
    same = ("batch_size", "shard_size", "threads")
    assert [chosen[0][name] for name in same] == [chosen[1][name] for name in same] == [32, 1024, 1]
