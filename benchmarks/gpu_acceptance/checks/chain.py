"""From images to predictions in every precision: what is trained on a GPU has to leave its gates with exit
code 0."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.gpu_acceptance.report import Context
from benchmarks.gpu_acceptance.training import module, sentence
from benchmarks.gpu_acceptance.training import run as start
from ffl_deploy.data.datasets import DataSpec, load_data


def run(context: Context) -> None:
    images = digits(context.work / "digits")
    precisions = ("fp32", "bf16", "fp16") if context.gpu else ("fp32",)
    if not context.gpu:
        context.report.leave_out("bf16, fp16: need a GPU; of the targets all but the fused one")
    with ThreadPoolExecutor(len(precisions) if context.gpu else 1) as pool:
        for done in [pool.submit(one, context, precision, images) for precision in precisions]:
            done.result()


def one(context: Context, precision: str, images: Path) -> None:
    """Train, export, verify, predict."""
    folder, report = context.work / f"chain-{precision}", context.report
    train = ["--data", "digits", "--device", context.device, "--precision", precision, *context.size(3)]
    whole = ["--target", "all", "--precision", "int8", "--precision", "fp16"]
    further = whole if precision == "fp32" and context.gpu else []
    bundles, rows = folder / "bundles", folder / "rows.jsonl"
    commands = {
        "train": module("train.run", *train, "--quiet", "--out", str(folder / "run")),
        "export": module("export.cli", str(folder / "run"), *further, "--out", str(bundles)),
        "verify": module("ffl_deploy.verify", str(bundles / "fused")),
        "predict": module("serve.predict.command", str(bundles / "fused"), str(images), "--out", str(rows)),
    }
    seconds = {}
    for name, command in commands.items():
        begun = time.monotonic()
        done = start(command)
        seconds[name] = round(time.monotonic() - begun, 1)
        report.note(**{f"{precision}_seconds": dict(seconds)})
        report.must(f"{precision}: {name} ends with 0", done.returncode == 0)
        if done.returncode:
            report.note(**{f"{precision}_{name}": sentence(done)})
            break
    else:
        toolchain = json.loads((folder / "run" / "config.json").read_text())["toolchain"]
        accuracy = json.loads((folder / "run" / "summary.json").read_text())["accuracy"]["fused"]
        answers = [json.loads(line)["status"] for line in rows.read_text().splitlines()]
        report.must(f"{precision}: a row for every image", answers == ["ok"] * len(list(images.iterdir())))
        report.note(**{f"{precision}_accuracy": accuracy, f"{precision}_device": toolchain["device"]})
        if context.gpu:
            import torch

            report.must(
                f"{precision}: it trained on the GPU", toolchain["device"] == torch.cuda.get_device_name()
            )
            report.must(f"{precision}: in {precision}", toolchain["precision"] == precision)


def digits(folder: Path) -> Path:
    """-> a folder of twenty digits as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(load_data(DataSpec(source="digits")).test.read(np.arange(20))):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder
