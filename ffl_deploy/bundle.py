"""A bundle: the folder that deployment takes. One target, its variants, golden samples, and a manifest of every file.

    DIR/TARGET/  bundle.json  model.onnx  [model.int8.onnx  engines/*.engine ...]  golden.npz  README.md

The manifest is data and names files inside the folder only; `load_bundle` refuses anything else before a file is opened.
Nothing here imports torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from ffl_deploy.arrays import read_arrays
from ffl_deploy.errors import CheckError, UsageError, choices_sentence
from ffl_deploy.files import replace_file, sha256_of, shown, write_atomically
from ffl_deploy.images import Pixels, Preprocessing
from ffl_deploy.manifest import (
    DEFAULT_VARIANT,
    MANIFEST,
    SCHEMA,
    Golden,
    InputTensor,
    Manifest,
    OutputTensor,
    Source,
    Temperature,
    Variant,
    file_records,
    read_manifest,
    write_manifest,
)
from ffl_deploy.verified_on import VerifiedOn

if TYPE_CHECKING:
    from ffl_deploy.fastest import Choice
    from ffl_deploy.runtime import Session

GOLDEN = "golden.npz"
AUTO = "auto"
"""In place of a variant's name: the fastest one that holds its gate on this machine."""


class GoldenSamples(NamedTuple):
    images: np.ndarray  # uint8 [n, height, width, 3]
    labels: np.ndarray  # int64 [n]; -1 where a label is not known
    logits: np.ndarray  # float32 [n, classes]: PyTorch's


class Prediction(NamedTuple):
    """What one image was taken for; `top` is sorted by falling probability."""

    label: str
    label_id: int
    confidence: float
    top: list[tuple[str, float]]
    logits: np.ndarray  # float32 [classes]


class Bundle:
    """A bundle on disk whose manifest has been read and whose file names have been checked."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._sessions: dict[tuple[str | None, str | None], Session] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def classes(self) -> list[str]:
        return self.manifest.classes

    @property
    def preprocessing(self) -> Preprocessing:
        return self.manifest.input.preprocessing

    @cached_property
    def sha256(self) -> str:
        """Identity of the bundle: the hash of the manifest, which holds the hash of everything else."""
        return sha256_of(self.folder / MANIFEST)

    def variant(self, name: str | None = None) -> Variant:
        """-> the variant called `name`; without a name the fp32 one, or the only one. Raises UsageError."""
        variants = {variant.name: variant for variant in self.manifest.variants}
        wanted = name or (DEFAULT_VARIANT if DEFAULT_VARIANT in variants else next(iter(variants)))
        if wanted not in variants:
            raise UsageError(f"{self.folder} has no variant {wanted!r}. {choices_sentence(wanted, [*variants, AUTO])}")
        return variants[wanted]

    def checked_file(self, name: str) -> Path:
        """-> path of a listed file whose content has the recorded hash. Raises CheckError; call it before opening a model."""
        path, record = self.folder / name, self.manifest.files[name]
        if not path.is_file():
            raise CheckError(f"{path} is missing; export the bundle again or copy it completely.")
        if path.stat().st_size != record.bytes or sha256_of(path) != record.sha256:
            raise CheckError(f"{path} was changed since export (SHA-256 differs); export the bundle again or copy it anew.")
        return path

    @property
    def temperature(self) -> float:
        """What the graph divides the logits by before the softmax."""
        calibration = self.manifest.calibration
        return 1.0 if calibration is None else calibration.temperature

    def golden(self) -> GoldenSamples:
        """-> the golden samples, after a check of their hash and shapes. Raises CheckError."""
        path = self.checked_file(self.manifest.golden.file)
        arrays = read_arrays(path, GoldenSamples._fields)
        samples = GoldenSamples(**{name: arrays[name] for name in GoldenSamples._fields})
        size, count = self.preprocessing, len(np.atleast_1d(samples.labels))
        shapes = [(count, size.height, size.width, 3), (count,), (count, len(self.classes))]
        kinds = [samples.images.dtype == np.uint8, samples.labels.dtype.kind in "iu", samples.logits.dtype.kind == "f"]
        if [array.shape for array in samples] != shapes or not all(kinds) or count == 0:
            found = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in samples._asdict().items())
            raise CheckError(f"{path} does not hold samples of this bundle ({found}); export the bundle again.")
        return samples

    def session(
        self, variant: str | None = None, runtime: str | None = None, threads: int | None = None, *, check: bool = True
    ) -> Session:
        """-> a new Session on `variant` (fp32) with `runtime` (the variant's own), using `threads` cores (all).

        Before it is handed out it has given PyTorch's logits of the golden samples, now or, on this processor with this
        runtime, earlier (`ffl_deploy.selfcheck`). variant: "auto" takes what `fastest` finds.

        Args: check: False for callers who judge the session themselves, or ask it nothing but the time.
        Raises UsageError (unknown or missing runtime, a file it does not read), CheckError (file changed, model refused,
        answers that are not PyTorch's; the sentence names a variant that holds here).
        """
        from ffl_deploy.runtime import open_session

        if variant == AUTO:
            choice = self.fastest(runtime, threads)
            variant, runtime = choice.variant, choice.runtime
        chosen = self.variant(variant)
        session = open_session(self, chosen, runtime=runtime, threads=threads)
        if check:
            from ffl_deploy.selfcheck import require_golden

            require_golden(self, chosen, session, threads)
        return session

    def fastest(self, runtime: str | None = None, threads: int | None = None, remembered: bool = True) -> Choice:
        """-> the fastest variant that holds its gate on this machine, and why it is; `ffl_deploy.fastest` measures it once."""
        from ffl_deploy.fastest import fastest

        return fastest(self, runtime, threads, remembered)

    def predict(
        self,
        images: Sequence[Pixels | bytes | str | os.PathLike[str]],
        *,
        top_k: int = 5,
        variant: str | None = None,
        runtime: str | None = None,
        batch_size: int = 64,
    ) -> list[Prediction]:
        """Classify images; -> one Prediction for each, in order.

        Args:
            images: uint8 RGB arrays [height, width, 3] of any size, encoded images as bytes, or paths of image files.
            top_k: classes in `Prediction.top` (at least 1, at most all of them).
            variant, runtime: as for `session`.
            batch_size: images in one inference; bounds the memory, does not change the answers beyond the last bit.
        Raises ImageError (with the image's path or position) for one that cannot be decoded, OSError for a path that cannot
        be read, ValueError for an array of another kind and for numbers below 1, CheckError where the model's output is not
        finite, UsageError and CheckError as `session`. For a row per image, errors included, use ffl-predict.

        Thread-safe: one session per (variant, runtime) is opened, at the first call, and shared by all threads.
        """
        from ffl_deploy.images import prepare

        if isinstance(images, str | bytes | os.PathLike):
            raise ValueError(f"images is one {type(images).__name__}; give a list: predict([image])")
        if top_k < 1 or batch_size < 1:
            raise ValueError(f"top_k is {top_k} and batch_size is {batch_size}; both have to be at least 1")
        session = self._shared_session(variant, runtime)
        predictions: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            batch = [
                prepare(_pixels(image, start + offset), self.preprocessing)
                for offset, image in enumerate(images[start : start + batch_size])
            ]
            outputs = session.run(np.stack(batch))
            bad = np.flatnonzero(~outputs.finite)
            if len(bad):
                raise CheckError(f"the model's output for image {start + bad[0]} is not a finite number.")
            predictions += [self.prediction(outputs.logits[i], outputs.probabilities[i], top_k) for i in range(len(batch))]
        return predictions

    def _shared_session(self, variant: str | None, runtime: str | None) -> Session:
        key = (variant, runtime)
        with self._lock:  # two first calls at once open one session, not two
            if key not in self._sessions:
                self._sessions[key] = self.session(variant, runtime)
            return self._sessions[key]

    def prediction(self, logits: np.ndarray, probabilities: np.ndarray, top_k: int = 5) -> Prediction:
        """-> one image's Prediction from its logits [classes] and probabilities [classes]; equal values keep class order."""
        order = np.argsort(-probabilities, kind="stable")[:top_k]
        top = [(self.classes[i], float(probabilities[i])) for i in order]
        return Prediction(top[0][0], int(order[0]), top[0][1], top, logits)


def _pixels(image: Pixels | bytes | str | os.PathLike[str], position: int) -> Pixels:
    """-> uint8 [height, width, 3] of any kind of input to `predict`; an ImageError names the image."""
    from ffl_deploy.images import ImageError, decode, load

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"image {position} is {image.dtype} {list(image.shape)}; give uint8 RGB [height, width, 3]")
        return image
    try:
        return decode(image).pixels if isinstance(image, bytes) else load(image)
    except ImageError as error:
        name = f"image {position}" if isinstance(image, bytes) else os.fspath(image)
        raise ImageError(error.code, f"{name}: {error}") from error


def load_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Read and check `folder/bundle.json`; files are hashed when they are used (`ffl-verify` hashes them all).

    Raises UsageError where there is no bundle, CheckError where there is a corrupt one.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise UsageError(f"{shown(folder)} is not a folder; give the folder that ffl-export wrote (it holds {MANIFEST}).")
    if not (folder / MANIFEST).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
        hint = f"give one of the bundles inside it: {', '.join(inside)}" if inside else "write one with ffl-export"
        raise UsageError(f"{shown(folder)} holds no {MANIFEST}; {hint}.")
    return Bundle(folder, read_manifest(folder / MANIFEST))


def write_golden(folder: Path, samples: GoldenSamples, origin: str) -> Golden:
    """Write `folder/golden.npz` and return its record; equal samples give equal bytes (NumPy dates no member)."""
    path = folder / GOLDEN
    with replace_file(path) as file:
        np.savez_compressed(file, images=samples.images, labels=samples.labels, logits=samples.logits)
    return Golden(GOLDEN, sha256_of(path), len(samples.labels), origin)


def write_bundle(
    folder: Path,
    *,
    target: str,
    classes: Sequence[str],
    input: InputTensor,
    outputs: Sequence[OutputTensor],
    source: Source,
    variants: Sequence[Variant],
    golden: GoldenSamples,
    origin: str,
    toolchain: dict[str, str],
    calibration: Temperature | None = None,
    verified_on: list[VerifiedOn] | msgspec.UnsetType = msgspec.UNSET,
    card: Callable[[Manifest], str],
) -> Manifest:
    """Make a bundle of `folder`, which holds the variants' files: golden samples, model card, and last the manifest.

    Args: origin: where the golden images come from; card: -> README.md, from the manifest without `files`.
    """
    manifest = Manifest(
        schema=SCHEMA,
        target=target,
        classes=list(classes),
        input=input,
        outputs=list(outputs),
        source=source,
        variants=list(variants),
        golden=write_golden(folder, golden, origin),
        files={},
        toolchain=toolchain,
        calibration=calibration,
        verified_on=verified_on,
    )
    write_atomically(folder / "README.md", card(manifest))
    manifest = msgspec.structs.replace(manifest, files=file_records(folder))
    write_manifest(folder, manifest)
    return manifest
