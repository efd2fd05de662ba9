"""The command: rows, formats, columns, exit codes, reports, and that it starts fast and alone."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ffl_deploy.bundle import Bundle
from serve.predict.labelled import LabelCounts, count_labels
from serve.predict.summary import Histogram
from serve.rows import Row

Predict = Callable[..., Any]
Photo = Callable[..., bytes]
ROOT = Path(__file__).parents[3]
# The contract of docs/predict.md.
COLUMNS = [
    "path",
    "status",
    "error",
    "label",
    "label_id",
    "confidence",
    "top_k_labels",
    "top_k_confidences",
    "width",
    "height",
]


def test_rows_are_what_the_library_predicts(predict: Predict, folder: Path, tiny_bundle: Bundle) -> None:
    run = predict(folder, flags=["--top-k", "2", "--logits"])
    assert run.code == 0
    files = [folder / "a.jpg", folder / "b.png", folder / "sub" / "c.webp"]
    assert [row["path"] for row in run.rows] == list(map(str, files))
    for row, expected in zip(run.rows, tiny_bundle.predict(files, top_k=2), strict=True):
        assert list(row) == [*COLUMNS, "logits"]
        assert (row["status"], row["error"], row["width"], row["height"]) == ("ok", None, 48, 40)
        assert (row["label"], row["label_id"]) == (expected.label, expected.label_id)
        assert row["top_k_labels"] == [label for label, _ in expected.top]
        np.testing.assert_allclose(row["top_k_confidences"], [value for _, value in expected.top], atol=1e-6)
        assert row["confidence"] == row["top_k_confidences"][0]
        np.testing.assert_allclose(row["logits"], expected.logits, atol=1e-4)


def test_the_three_formats_say_the_same(predict: Predict, folder: Path) -> None:
    (folder / "bad.jpg").write_bytes(b"")
    flags = ["--batch-size", "4", "--shard-size", "3"]
    json_rows = predict(folder, flags=flags).rows
    parquet = predict(folder, flags=flags, out="p.parquet").out
    table = pq.read_table(parquet)
    assert table.column_names == COLUMNS
    assert str(table.schema.field("path").type) == "string"
    assert pq.ParquetFile(parquet).num_row_groups == 2
    for row, other in zip(table.to_pylist(), json_rows, strict=True):
        assert row["path"] == other["path"]
        assert row["top_k_labels"] == other["top_k_labels"]
        assert row["confidence"] == other["confidence"]
    with open(predict(folder, flags=flags, out="p.csv").out, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        csv_rows = list(reader)
    assert reader.fieldnames == COLUMNS
    for row, other in zip(csv_rows, json_rows, strict=True):
        assert row["label"] == (other["label"] or "")
        if other["status"] == "ok":
            assert float(row["confidence"]) == other["confidence"]
            assert json.loads(row["top_k_labels"]) == other["top_k_labels"]


def test_the_format_follows_the_flag_then_the_suffix(predict: Predict, folder: Path) -> None:
    assert predict(folder, out="plain").out.read_bytes()[:4] == b"PAR1"
    assert predict(folder, out="x.csv", flags=["--format", "jsonl"]).out.read_bytes()[:1] == b"{"
    run = predict(folder, out="x.json")
    assert (run.code, "--format" in run.stderr) == (2, True)


def test_embeddings_come_from_the_graph_or_not_at_all(
    predict: Predict, folder: Path, tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    refused = predict(folder, flags=["--embedding"])
    assert refused.code == 2
    assert "no output 'embedding'" in refused.stderr
    run = predict(folder, flags=["--embedding"], bundle=make_bundle(tmp_path / "embedding", embedding=True))
    assert [len(row["embedding"]) for row in run.rows] == [8, 8, 8]
    assert all(value >= 0 for row in run.rows for value in row["embedding"]), "pooled behind a ReLU"


def test_variants_and_runtimes(
    predict: Predict, folder: Path, tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    bundle = make_bundle(tmp_path / "two", variants=("fp32", "other"))
    assert predict(folder, bundle=bundle, flags=["--variant", "other"]).code == 0
    summary = json.loads((tmp_path / "out" / "predictions.jsonl.summary.json").read_text())
    assert (summary["request"]["variant"], summary["request"]["runtime"]) == ("other", "onnxruntime")
    for flags, known in ((["--variant", "nope"], "fp32, other"), (["--runtime", "nope"], "onnxruntime")):
        run = predict(folder, bundle=bundle, flags=flags)
        assert (run.code, known in run.stderr) == (2, True)


def test_the_old_output_stays_until_the_new_one_is_complete(
    predict: Predict, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.predict import runner

    first = predict(folder)
    before = first.out.read_bytes()
    (folder / "d.jpg").write_bytes(b"")
    monkeypatch.setattr(runner, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert predict(folder).code == 130
    assert first.out.read_bytes() == before
    monkeypatch.undo()
    assert len(predict(folder, flags=["--resume"]).rows) == 4


def test_usage_errors_are_one_sentence(predict: Predict, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "dir.jsonl").mkdir(parents=True)
    run = predict(folder, out="dir.jsonl")
    assert (run.code, run.stderr.count("\n")) == (2, 1)
    (tmp_path / "file").write_text("")
    run = predict(folder, out="../file/x.jsonl")
    assert (run.code, run.stderr.count("\n")) == (2, 1)


def test_json_and_quiet_modes(predict: Predict, folder: Path) -> None:
    (folder / "bad.jpg").write_bytes(b"")
    run = predict(folder, flags=["--json"])
    summary = json.loads(run.stdout)
    assert (summary["rows"], summary["ok"], summary["errors"]) == (4, 3, 1)
    assert summary["statuses"] == {"empty": 1, "ok": 3}
    assert sum(summary["labels"].values()) == 3
    assert summary["decode_share"] + summary["infer_share"] == pytest.approx(1, abs=1e-3)
    assert summary["decode_ms_per_image"]["p95"] >= summary["decode_ms_per_image"]["p50"] > 0
    events = [json.loads(line) for line in run.stderr.splitlines()]
    assert events[-1]["done"] == 4
    assert {"total", "images_per_second", "eta_seconds"} <= events[-1].keys()
    written = json.loads(run.out.with_name("predictions.jsonl.summary.json").read_text())
    assert written == summary
    quiet = predict(folder, flags=["--quiet"])
    assert (quiet.code, quiet.stdout, quiet.stderr) == (3, "", "")
    screen = predict(folder)
    assert "3 ok, 1 with an error" in screen.stdout
    assert "errors: empty 1" in screen.stdout


def test_labelled_folder_gets_a_report(
    predict: Predict, tmp_path: Path, photo: Photo, tiny_bundle: Bundle
) -> None:
    root = tmp_path / "test"
    for index in range(30):
        name = tiny_bundle.classes[index % 3]
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{index:02d}.png").write_bytes(photo(index, "PNG"))
    (root / "cat" / "bad.jpg").write_bytes(b"")
    run = predict(root, flags=["--batch-size", "8", "--shard-size", "7", "--top-k", "2"])
    report = json.loads(run.out.with_name("predictions.jsonl.report.json").read_text())
    good = [row for row in run.rows if row["status"] == "ok"]
    truth = [Path(row["path"]).parent.name for row in good]
    right = [row["label"] == true for row, true in zip(good, truth, strict=True)]
    assert report["labelled_rows"] == 31
    assert report["rows_without_prediction"] == 1
    assert report["accuracy"] == pytest.approx(sum(right) / 30)
    assert report["accuracy_all"] == pytest.approx(sum(right) / 31)
    assert report["top_k_accuracy"] == pytest.approx(
        sum(true in row["top_k_labels"] for row, true in zip(good, truth, strict=True)) / 30
    )
    for entry in report["classes"]:
        name = entry["class"]
        mine = [row["label"] == name for row, true in zip(good, truth, strict=True) if true == name]
        predicted = [true == name for row, true in zip(good, truth, strict=True) if row["label"] == name]
        assert entry["recall"] == pytest.approx(sum(mine) / 10)
        assert entry["precision"] == (pytest.approx(sum(predicted) / len(predicted)) if predicted else None)
    confidences = np.array([row["confidence"] for row in good])
    bins = np.minimum((confidences * 15).astype(int), 14)
    error = sum(
        abs(np.mean(np.array(right)[bins == b]) - confidences[bins == b].mean()) * (bins == b).sum()
        for b in set(bins.tolist())
    )
    assert report["expected_calibration_error"] == pytest.approx(error / 30)
    assert run.out.with_name("predictions.jsonl.report.png").read_bytes()[:4] == b"\x89PNG"
    assert "accuracy" in run.stdout


def test_labels_by_number_and_unknown_labels() -> None:
    ok = Row("p", "ok", None, "dog", 1, 0.8, ["dog", "cat"], [0.8, 0.2])
    counts = count_labels(
        [ok, ok, ok, ok, Row("q", "empty", "e")], ["1", "dog", "bird", None, "0"], ["cat", "dog"]
    )
    assert counts.confusion == {"dog": {"dog": 2}}
    assert (counts.unknown, counts.failed, counts.top_k) == (1, {"cat": 1}, 2)
    assert count_labels([ok, ok, ok], ["2", "9" * 5000, "²"], ["cat", "dog"]).unknown == 3
    total = LabelCounts()
    total.add(counts)
    total.add(counts)
    assert (total.confusion, total.unknown, total.predicted) == ({"dog": {"dog": 4}}, 2, 4)


def test_histogram_percentiles_are_within_one_percent() -> None:
    values = np.random.default_rng(0).lognormal(-6, 1, 5000)
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    for percent in (50, 95):
        assert histogram.percentile(percent) == pytest.approx(np.percentile(values, percent), rel=0.02)
    assert histogram.total == pytest.approx(values.sum())
    assert Histogram().percentile(50) is None


def test_batches_do_not_depend_on_threads(predict: Predict, tmp_path: Path, photo: Photo) -> None:
    root = tmp_path / "many"
    root.mkdir()
    for index in range(70):
        (root / f"{index:02d}.jpg").write_bytes(photo(index, size=(24, 20)))
    runs = [
        predict(
            root,
            flags=["--batch-size", "16", "--shard-size", "24", "--threads", threads, "--logits"],
            out=f"{threads}.parquet",
        )
        for threads in ("1", "2", "3")
    ]
    assert len({run.out.read_bytes() for run in runs}) == 1


def test_settings_are_measured_for_a_long_run_only(
    predict: Predict, tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.predict import runner, tuning

    calls = []
    real = tuning.fastest
    monkeypatch.setattr(tuning, "fastest", lambda *arguments: calls.append(1) or real(*arguments))
    monkeypatch.setattr(tuning, "MEASURE_SECONDS", 0.01)
    root = tmp_path / "many"
    root.mkdir()
    for index in range(12):
        (root / f"{index}.jpg").write_bytes(photo(index))
    predict(root)
    assert calls == []
    monkeypatch.setattr(runner, "SMALL_RUN", 10)
    run = predict(root)
    assert calls == [1]
    settings = json.loads(run.out.with_name("predictions.jsonl.summary.json").read_text())["settings"]
    assert settings["batch_size"] in tuning.BATCH_SIZES


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve.predict", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_nothing_heavy_is_imported(folder: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    script = """
import sys
from serve.predict.command import main
code = main(sys.argv[1:])
heavy = ("torch", "torchvision", "scipy.stats", "sklearn", "gradio", "ray", "pandas")
print([name for name in heavy if name in sys.modules])
sys.exit(code)
"""
    arguments = [tiny_bundle.folder, folder, "--out", tmp_path / "x.parquet", "--quiet"]
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


def test_no_file_appears_outside_the_output_folder_but_the_verdict(
    folder: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "TMPDIR": str(home), "PYTHONPATH": str(ROOT)}
    arguments = [tiny_bundle.folder, folder, "--out", tmp_path / "new" / "x.jsonl"]
    before = sorted(tmp_path.rglob("*"))
    subprocess.run(
        [sys.executable, "-m", "serve.predict", *map(str, arguments)], env=environment, check=True, cwd=home
    )
    (verdict,) = (home / ".cache/ffl-deploy/verdicts").iterdir()
    after = sorted(tmp_path.rglob("*"))
    assert [str(path.relative_to(tmp_path)) for path in after if path not in before] == [
        "home/.cache",
        "home/.cache/ffl-deploy",
        "home/.cache/ffl-deploy/verdicts",
        f"home/.cache/ffl-deploy/verdicts/{verdict.name}",
        "new",
        "new/x.jsonl",
        "new/x.jsonl.summary.json",
    ]


@pytest.mark.slow
def test_one_image_in_a_second_and_help_in_half(folder: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Wall time of the process, best of five: what the machine can do when nothing else runs."""

    def best(*arguments: object, code: int = 0) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            assert command(*arguments).returncode == code
            times.append(time.perf_counter() - started)
        return min(times)

    assert best("--help") < 0.5
    assert best(tiny_bundle.folder, folder / "a.jpg", "--out", tmp_path / "x.parquet") < 1.0


def test_help_goes_to_standard_output() -> None:
    run = command("--help")
    assert run.returncode == 0
    assert "one row per input" in run.stdout
    assert run.stderr == ""
