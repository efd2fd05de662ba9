"""Ranges of every activation, for quantisation: one pass over the calibration images serves three methods."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ffl_deploy.runtime.replay import whole_batches

METHODS = ("minmax", "percentile", "entropy")
IMAGES = 256
PERCENTILE = 99.99
CHUNK = 64  # images at a time, and fewer where their activations would take more than
# of memory: ResNet-32's are about 1.5 MB an image of 32 pixels, ResNet-50's 110 MB of 224
CHUNK_BYTES = 512 << 20


def chunk_size(bytes_per_image: int) -> int:
    """-> how many images to take at a time, when one image's activations take so many bytes."""
    return max(1, min(CHUNK, CHUNK_BYTES // max(1, bytes_per_image)))


def collect_ranges(
    model: Path, images: np.ndarray, operators: Sequence[str], batch: int | None = None
) -> dict[str, Any]:
    """-> method -> onnxruntime.quantization.TensorsData with the range of every tensor around `operators`.

    `minmax` takes the extremes, `percentile` the central 99.99 % (2048 bins), `entropy` the range with the
    least KL divergence between the float and the quantised histogram (128 bins, as TensorRT and MXNet do it).

    Args: model: a pre-processed fp32 file; images: uint8 [n, h, w, 3], training images; batch: the only size
    that it takes, None for any (some images then count twice, to fill the last batch).
    """
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import (
        HistogramCollector,
        TensorData,
        TensorsData,
        create_calibrator,
    )

    # a file that gives every tensor, and two histograms of different width
    calibrator = create_calibrator(
        model,
        operators,
        augmented_model_path=str(model.with_suffix(".augmented.onnx")),
        calibrate_method=CalibrationMethod.Percentile,
    )
    common = {"symmetric": False, "percentile": PERCENTILE, "scenario": "same"}
    wide = HistogramCollector(method="percentile", num_bins=2048, num_quantized_bins=2048, **common)
    narrow = HistogramCollector(method="entropy", num_bins=128, num_quantized_bins=128, **common)
    names = [output.name for output in calibrator.infer_session.get_outputs()]
    wanted = set(calibrator.tensors_to_calibrate)

    # as many images at a time as memory allows, or as the file takes
    chunk = batch or chunk_size(
        sum(value.nbytes for value in calibrator.infer_session.run(None, {"images": images[:1]}))
    )
    images = whole_batches(images, batch)

    # one pass over the images fills both; the collectors print as they go
    with contextlib.redirect_stdout(io.StringIO()):
        for start in range(0, len(images), chunk):
            values = calibrator.infer_session.run(None, {"images": images[start : start + chunk]})
            tensors = {name: value for name, value in zip(names, values, strict=True) if name in wanted}
            wide.collect(tensors)
            narrow.collect(tensors)
        extremes = {
            name: TensorData(lowest=np.float32(histogram[2]), highest=np.float32(histogram[3]))
            for name, histogram in wide.histogram_dict.items()
        }
        return {
            "minmax": TensorsData(CalibrationMethod.MinMax, extremes),
            "percentile": TensorsData(CalibrationMethod.Percentile, wide.compute_collection_result()),
            "entropy": TensorsData(CalibrationMethod.Entropy, narrow.compute_collection_result()),
        }
