"""A session on many images: batch by batch, from several callers at once,
and at several batch sizes against a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ffl_deploy.errors import CheckError
from ffl_deploy.parity import ParityMetrics, compare
from ffl_deploy.runtime.session import Outputs

SMALL_BATCH_IMAGES = 64
"""Images compared at batches below 64; those batches look for shape errors,
which more images do not show better."""
AT_ONCE = 256
SMALL_SIDE = 96  # pixels up to which so many images are a batch


def measure(
    run: Callable[[np.ndarray], Outputs],
    images: np.ndarray,
    reference: np.ndarray,
    batches: Sequence[int],
    temperature: float = 1.0,
) -> dict[str, ParityMetrics]:
    """Run a model at several batch sizes and compare each with the reference.

    Args: run: uint8 [b, h, w, 3] -> Outputs; images: uint8 [n, h, w, 3]; reference: logits [n, classes].
    Raises CheckError where the model refuses a batch or answers with another number of rows.
    """
    measured = {}
    for batch in batches:
        count = len(images) if batch >= SMALL_BATCH_IMAGES else min(len(images), SMALL_BATCH_IMAGES)
        outputs = run_in_batches(run, images.__getitem__, count, batch)
        measured[str(batch)] = compare(reference[:count], outputs.logits, outputs.probabilities, temperature)
    return measured


def whole_batches(images: np.ndarray, batch: int | None) -> np.ndarray:
    """-> `images` [n, h, w, 3], from the first one on again until they fill batches of the only size that a
    file takes; as they are where it takes any (None)."""
    if batch is None:
        return images
    return np.resize(images, (-(-len(images) // batch) * batch, *images.shape[1:]))


def images_at_once(count: int, height: int, width: int) -> int:
    """-> how many of `count` images of this size are computed together at most: fewer of large ones, whose
    maps would take gigabytes (256 of 224 pixels took an EfficientNet-Lite ten)."""
    return min(count, max(SMALL_BATCH_IMAGES, AT_ONCE * SMALL_SIDE**2 // (height * width)))


def batch_of(most: int, callers: int, height: int, width: int) -> int:
    """-> how many images of this size each of `callers` computes at once: at most `most`, and together no
    more than images_at_once, for each keeps the memory of its largest batch; no fewer than eight."""
    return min(most, max(8, AT_ONCE * SMALL_SIDE**2 // (height * width * callers)))


def passes(count: int, height: int, width: int) -> list[slice]:
    """-> the rows of each pass over `count` images of this size."""
    size = images_at_once(count, height, width)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)] if count else []


def golden_batches(images: int) -> list[int]:
    """-> the batch sizes at which golden samples are compared: one, an odd one, all."""
    return sorted({1, min(7, images), images})


def run_in_batches(
    run: Callable[[np.ndarray], Outputs],
    read: Callable[[slice], np.ndarray],
    count: int,
    batch: int,
    callers: int = 1,
) -> Outputs:
    """-> logits, probabilities and what else is one number an image, of the first `count` images, `batch` at
    a time. Raises CheckError for lost rows.

    callers: threads that call `run` at the same time; the order of the answers is that of the images.
    """

    def answer(start: int) -> Outputs:
        part = read(slice(start, min(start + batch, count)))
        outputs = run(part)
        if len(outputs.logits) != len(part) or len(outputs.probabilities) != len(part):
            raise CheckError(
                f"a batch of {len(part)} images came back with {len(outputs.logits)} rows of logits."
            )
        # maps and embeddings of a whole test set would take its memory; one number an image does not
        small = [values if values is None or values.ndim == 1 else None for values in outputs[2:]]
        return Outputs(outputs.logits, outputs.probabilities, *small)

    with ThreadPoolExecutor(callers) as pool:
        answers = list((pool.map if callers > 1 else map)(answer, range(0, count, batch)))
    return Outputs.joined(answers)
