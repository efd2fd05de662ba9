"""What the page computes is what Python computes: pixels, metrics, rows. By Node;
test_page.py has a browser."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from ffl_deploy.images import prepare
from ffl_deploy.parity import PARITY_GATES, TIE, UNDIRECTED, compare, judge
from ffl_deploy.preprocessing import Preprocessing
from serve.rows import COLUMNS, Row, encode

Node = Callable[..., Any]
SIZES = [(1, 1), (1, 300), (7, 5), (31, 32), (33, 64), (200, 3), (97, 211), (640, 427), (32, 50)]
SIZES += [(300, 1), (301, 3)]  # so tall that Pillow scales the columns first
SIZES += [(137, 120), (120, 137), (60, 66)]  # rounding puts the box of a crop a hair outside

PREPARE = """
import { prepare } from "./page/resize.js";
function main(cases) {
  return cases.map(({ pixels, width, height, preprocessing }) => {
    const image = { pixels: new Uint8Array(Buffer.from(pixels, "base64")), width, height };
    return Buffer.from(prepare(image, preprocessing)).toString("base64");
  });
}
"""


@pytest.mark.parametrize("filter", ["box", "bilinear", "bicubic", "lanczos"])
def test_resizing_gives_pillows_bytes(node: Node, filter: str) -> None:
    rng = np.random.default_rng(0)
    images, targets = [], []
    for height, width in SIZES:
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        hard = (noise > 127).astype(np.uint8) * 255  # negative lobes overshoot on both sides
        for pixels in (noise, hard):
            for resize, fraction in (("stretch", 1.0), ("crop", 1.0), ("crop", 0.875)):
                for size in ((32, 32), (48, 20), (29, 31)):
                    images.append(pixels)
                    targets.append(Preprocessing(*size, resize=resize, crop_fraction=fraction, filter=filter))
    cases = [
        {
            "pixels": base64.b64encode(pixels.tobytes()).decode(),
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "preprocessing": msgspec.to_builtins(target),
        }
        for pixels, target in zip(images, targets, strict=True)
    ]
    answers = [np.frombuffer(base64.b64decode(answer), np.uint8) for answer in node(PREPARE, cases)]
    for pixels, target, answer in zip(images, targets, answers, strict=True):
        wanted = prepare(pixels, target)
        np.testing.assert_array_equal(
            answer.reshape(wanted.shape), wanted, err_msg=f"{pixels.shape} {target}"
        )


WHITE = """
import { onWhite, upright } from "./page/image.js";
function main({ rgba, rgb, width, height }) {
  const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));
  const orientations = [1, 2, 3, 4, 5, 6, 7, 8];
  const turned = orientations.map((orientation) => upright(bytes(rgb), width, height, orientation));
  return {
    white: Buffer.from(onWhite(bytes(rgba))).toString("base64"),
    turned: turned.map((image) => [image.height, image.width, Buffer.from(image.pixels).toString("base64")]),
  };
}
"""


def test_transparency_and_orientation_are_pillows(node: Node) -> None:
    from ffl_deploy.images import _upright

    levels = np.arange(256, dtype=np.uint8)
    rgba = np.stack([*np.meshgrid(levels, levels)] * 2, axis=-1)  # every colour with every alpha
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    encoded = {
        "rgba": base64.b64encode(rgba.tobytes()).decode(),
        "rgb": base64.b64encode(rgb.tobytes()).decode(),
    }
    answer = node(WHITE, {**encoded, "width": 7, "height": 5})

    canvas = Image.new("RGBA", (256, 256), (255, 255, 255, 255))
    wanted = np.asarray(Image.alpha_composite(canvas, Image.fromarray(rgba)).convert("RGB"))
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(answer["white"]), np.uint8), wanted.ravel())
    for orientation, (height, width, pixels) in enumerate(answer["turned"], start=1):
        turned = np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(height, width, 3)
        np.testing.assert_array_equal(turned, _upright(rgb, orientation), err_msg=str(orientation))


COMPARE = """
import { compare, judge } from "./page/gate.js";
function main(cases) {
  return cases.map(({ reference, candidate, probabilities, classes, temperature, settings, gate }) => {
    const read = (values) => Float32Array.from(values, (value) => value ?? NaN);
    const arrays = [reference, candidate, probabilities].map(read);
    const metrics = compare(...arrays, classes, temperature, settings);
    return { metrics, problems: judge(metrics, gate) };
  });
}
"""


def test_the_gate_measures_and_judges_as_parity_does(node: Node) -> None:
    rng = np.random.default_rng(1)
    cases, wanted = [], []
    for classes in (3, 7, 100):
        reference = rng.normal(0, 3, (12, classes)).astype(np.float32)
        reference[3] *= 1e-3  # points nowhere
        reference[5, :2] = reference[5].max() + 1  # a tie
        for noise, temperature, gate in (
            (1e-6, 1.0, "fp32"),
            (1e-2, 1.0, "fp32"),
            (0.05, 1.7, "int8"),
            (1.5, 1.0, "int8"),
        ):
            candidate = (reference + rng.normal(0, noise, reference.shape)).astype(np.float32)
            if noise == 1.5 and classes == 7:
                candidate[2, 1] = np.nan
            scaled = np.exp((candidate - candidate.max(axis=1, keepdims=True)) / temperature)
            probabilities = (scaled / scaled.sum(axis=1, keepdims=True)).astype(np.float32)
            metrics = compare(reference, candidate, probabilities, temperature)
            wanted.append((metrics, judge({str(len(reference)): metrics}, PARITY_GATES[gate])))
            cases.append(
                {
                    "reference": reference.ravel().tolist(),
                    "candidate": [None if np.isnan(value) else float(value) for value in candidate.ravel()],
                    "probabilities": [
                        None if np.isnan(value) else float(value) for value in probabilities.ravel()
                    ],
                    "classes": classes,
                    "temperature": temperature,
                    "settings": {"tie": TIE, "undirected": UNDIRECTED},
                    "gate": msgspec.to_builtins(PARITY_GATES[gate]),
                }
            )
    answers = node(COMPARE, cases)
    assert {verdict.status for _, verdict in wanted} == {"passed", "failed"}
    for answer, (metrics, verdict) in zip(answers, wanted, strict=True):
        for name, value in answer["metrics"].items():
            assert value == pytest.approx(getattr(metrics, name), rel=1e-6, abs=1e-9), name
        assert len(answer["problems"]) == len(verdict.findings)


def test_golden_samples_are_read_as_numpy_writes_them(node: Node, tmp_path: Path) -> None:
    arrays = {
        "images": np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3),
        "labels": np.array([-1, 70000], np.int64),
        "logits": np.linspace(-2, 3, 10, dtype=np.float32).reshape(2, 5),
    }
    for name, save in (("stored", np.savez), ("packed", np.savez_compressed)):
        save(tmp_path / name, **arrays)
        encoded = base64.b64encode((tmp_path / f"{name}.npz").read_bytes()).decode()
        script = """
        import { readNpz } from "./page/golden.js";
        async function main(encoded) {
          const arrays = await readNpz(new Uint8Array(Buffer.from(encoded, "base64")));
          const listed = ([name, { data, shape }]) => [name, shape, Array.from(data, Number)];
          return Object.entries(arrays).map(listed);
        }
        """
        for key, shape, values in node(script, encoded):
            assert tuple(shape) == arrays[key].shape
            np.testing.assert_array_equal(np.array(values, arrays[key].dtype), arrays[key].ravel())


def test_a_cascade_names_the_classifier_that_answered(node: Node) -> None:
    script = """
    import { Model } from "./page/model.js";
    function main({ cascade }) {
      const model = new Model({ name: "one", variant: "int8" });
      const details = cascade ? { cascade } : {};
      model.manifest = { variants: [{ name: "fp32" }, { name: "int8", details }] };
      const answers = [0n, 1n].map((number) => ({ exit: { data: [number] } }));
      return [...answers, {}].map((answer) => model.answeredBy(answer));
    }
    """
    assert node(script, {"cascade": {"exits": ["branch0", "fused"]}}) == ["branch0", "fused", ""]
    assert node(script, {"cascade": None}) == ["exit 0", "exit 1", ""]


def test_the_csv_is_that_of_ffl_predict(node: Node) -> None:
    confidences = [float(np.float32(value)) for value in (0.7, 0.2, 1e-9)]
    labels = ['with "quotes", comma', "=SUM(A1)", "käse"]
    script = """
    import { errorRow, okRow, toCsv } from "./page/rows.js";
    function main({ labels, confidences }) {
      const top = labels.map((label, i) => ({ label, id: i + 4, confidence: confidences[i] }));
      const error = Object.assign(new Error("the file is empty"), { code: "empty" });
      const images = [{ width: 7, height: 5, animated: false }, { width: 1, height: 1, animated: true }];
      const broken = okRow("line\\nbreak.gif", images[1], top);
      return toCsv([okRow("a/b.png", images[0], top), errorRow("-x.png", error), broken]);
    }
    """
    answer = node(script, {"labels": labels, "confidences": confidences})
    ok = {"label": labels[0], "label_id": 4, "confidence": confidences[0]}
    ok |= {"top_k_labels": labels, "top_k_confidences": confidences}
    rows = [
        Row("a/b.png", "ok", **ok, width=7, height=5),
        Row("-x.png", "empty", "the file is empty"),
        Row(
            "line\nbreak.gif", "ok", "animated: only the first frame was classified", **ok, width=1, height=1
        ),
    ]
    wanted = ",".join(COLUMNS) + "\n" + encode(rows, "csv", ()).decode()
    read = [list(csv.reader(io.StringIO(text, newline=""))) for text in (answer, wanted)]
    assert read[0][0] == read[1][0]
    for found, expected in zip(read[0][1:], read[1][1:], strict=True):
        numbers = {COLUMNS.index("confidence"), COLUMNS.index("top_k_confidences")}
        for i, (cell, other) in enumerate(zip(found, expected, strict=True)):
            if i in numbers and other:
                assert msgspec.json.decode(cell) == msgspec.json.decode(other)
            else:
                assert cell == other
