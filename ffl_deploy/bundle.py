"""A bundle: the folder that deployment takes. One target, its variants, golden samples,
and a manifest of every file.

    DIR/TARGET/  bundle.json  model.onnx  [model.int8.onnx  engines/*.engine ...]  golden.npz  README.md

The manifest is data and names files inside the folder only; `load_bundle` refuses anything else before a file
is opened. Nothing here imports torch.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from ffl_deploy.bundle_files import AUTO, BundleFiles, GoldenSamples, write_golden
from ffl_deploy.contract import NOT_BOUND, carries_contract
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import did_you_mean, existing_folder, shown, write_atomically
from ffl_deploy.manifest import (
    MANIFEST,
    SCHEMA,
    InputTensor,
    Manifest,
    OutputTensor,
    RefusedVariant,
    Source,
    Temperature,
    Variant,
    file_records,
    read_manifest,
    write_manifest,
)
from ffl_deploy.preprocessing import Pixels
from ffl_deploy.probes import Probes
from ffl_deploy.signing import check_signature
from ffl_deploy.verified_on import VerifiedOn

if TYPE_CHECKING:
    from PIL import Image

    from ffl_deploy.fastest import Choice
    from ffl_deploy.runtime import Session

LOG = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """What one image was taken for; `top` is sorted by falling probability."""

    label: str
    label_id: int
    confidence: float
    top: list[tuple[str, float]]
    logits: np.ndarray  # float32 [classes]

    def __repr__(self) -> str:
        top = ", ".join(f"{label} {100 * value:.1f} %" for label, value in self.top)
        return f"<Prediction {top}>"


class Bundle(BundleFiles):
    """A bundle on disk whose manifest has been read and whose file names have been checked."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder, manifest)
        self._sessions: dict[tuple[str | None, str | None], Session] = {}
        self._lock = threading.Lock()
        self._remarked = False  # that it is an old one

    def __repr__(self) -> str:
        variants = ", ".join(variant.name for variant in self.manifest.variants)
        return (
            f"<Bundle {shown(self.folder)}: {self.manifest.target}, {len(self.classes)} classes, {variants}>"
        )

    def session(
        self,
        variant: str | None = None,
        runtime: str | None = None,
        threads: int | None = None,
        *,
        check: bool = True,
    ) -> Session:
        """-> a new Session on `variant` (fp32) with `runtime` (the variant's own),
        using `threads` cores (all).

        Before it is handed out it has given PyTorch's logits of the golden samples, now or, on this processor
        with this runtime, earlier (`ffl_deploy.selfcheck`). variant: "auto" takes what `fastest` finds.

        Args: check: False for callers who judge the session themselves, or ask it nothing but the time.
        Raises UsageError (unknown or missing runtime, a file it does not read), CheckError (file changed,
        model refused, answers that are not PyTorch's; the sentence names a variant that holds here).
        """
        if variant == AUTO:
            choice = self.fastest(runtime, threads)
            variant, runtime = choice.variant, choice.runtime
        chosen = self.variant(variant)
        session = self.open(variant, runtime, threads)
        model = self._models.get(chosen.file)
        if model and not self._remarked and not carries_contract(self.folder / model, self.manifest):
            self._remarked = True
            LOG.warning("%s: %s; export it again", shown(self.folder), NOT_BOUND)
        if check:
            from ffl_deploy.selfcheck import require_golden

            require_golden(self, chosen, session, threads)
        return session

    def fastest(
        self, runtime: str | None = None, threads: int | None = None, remembered: bool = True
    ) -> Choice:
        """-> the fastest variant that holds its gate on this machine, and why it is;
        `ffl_deploy.fastest` measures it once."""
        from ffl_deploy.fastest import fastest

        return fastest(self, runtime, threads, remembered)

    def predict(
        self,
        images: Sequence[Pixels | Image.Image | bytes | str | os.PathLike[str]],
        *,
        top_k: int = 5,
        variant: str | None = None,
        runtime: str | None = None,
        batch_size: int = 64,
    ) -> list[Prediction]:
        """Classify images; -> one Prediction for each, in order.

        Args:
            images: uint8 RGB arrays [height, width, 3] of any size, images of Pillow, encoded images as
                bytes, or paths of image files.
            top_k: classes in `Prediction.top` (1 to all).
            variant, runtime: as for `session`.
            batch_size: images in one inference; bounds the memory, does not change the answers beyond the
                last bit.

        Raises ImageError (with the image's path or position) for one that cannot be decoded, OSError for a
        path that cannot be read, ValueError for an array of another kind and for numbers below 1, CheckError
        where the model's output is not finite, UsageError and CheckError as `session`. For a row per image,
        errors included, use ffl-predict.

        Thread-safe: one session per (variant, runtime) is opened, at the first call,
        and shared by all threads.
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
            predictions += [
                self.prediction(outputs.logits[i], outputs.probabilities[i], top_k) for i in range(len(batch))
            ]
        return predictions

    def _shared_session(self, variant: str | None, runtime: str | None) -> Session:
        key = (variant, runtime)
        with self._lock:  # two first calls at once open one session, not two
            if key not in self._sessions:
                self._sessions[key] = self.session(variant, runtime)
            return self._sessions[key]

    def prediction(self, logits: np.ndarray, probabilities: np.ndarray, top_k: int = 5) -> Prediction:
        """-> one image's Prediction from its logits [classes] and probabilities [classes];
        equal values keep class order."""
        order = np.argsort(-probabilities, kind="stable")[:top_k]
        top = [(self.classes[i], float(probabilities[i])) for i in order]
        return Prediction(top[0][0], int(order[0]), top[0][1], top, logits)


def _pixels(image: Pixels | Image.Image | bytes | str | os.PathLike[str], position: int) -> Pixels:
    """-> uint8 [height, width, 3] of any kind of input to `predict`; an ImageError names the image."""
    from PIL import Image

    from ffl_deploy.images import ImageError, decode, load, pixels_of

    if isinstance(image, Image.Image):
        return pixels_of(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"image {position} is {image.dtype} {list(image.shape)}; give uint8 RGB [height, width, 3]"
            )
        return image
    try:
        return decode(image).pixels if isinstance(image, bytes) else load(image)
    except ImageError as error:
        name = f"image {position}" if isinstance(image, bytes) else os.fspath(image)
        raise ImageError(error.code, f"{name}: {error}") from error


def load_bundle(folder: str | os.PathLike[str], public_key: str | os.PathLike[str] | None = None) -> Bundle:
    """Read and check `folder/bundle.json`; files are hashed when they are used
    (`ffl-verify` hashes them all).

    public_key: an elliptic-curve key in PEM; a bundle that its owner has not signed is refused. Raises
    UsageError where there is no bundle, CheckError where there is a corrupt one, or another's.
    """
    folder = Path(os.path.abspath(folder))
    folder = existing_folder(folder) or folder
    wanted = f"give the folder that ffl-export wrote (it holds {MANIFEST})"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{shown(folder)} is a file and not a bundle; {wanted}, before any images.")
    if not folder.is_dir():
        raise UsageError(f"there is no folder {shown(folder)}; {wanted}.{did_you_mean(shown(folder))}")
    if not (folder / MANIFEST).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
        hint = (
            f"give one of the bundles inside it: {', '.join(inside)}"
            if inside
            else "write one with ffl-export"
        )
        raise UsageError(f"{shown(folder)} holds no {MANIFEST}; {hint}.")
    bundle = Bundle(folder, read_manifest(folder / MANIFEST))
    if public_key is not None:
        check_signature(folder, Path(public_key))
        if read_manifest(folder / MANIFEST) != bundle.manifest:  # what was read is what was signed
            raise CheckError(f"{shown(folder)} was replaced while it was opened; try again.")
    return bundle


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
    probes: Probes | None = None,
    toolchain: dict[str, str],
    calibration: Temperature | None = None,
    verified_on: list[VerifiedOn] | msgspec.UnsetType = msgspec.UNSET,
    refused: Sequence[RefusedVariant] = (),
    card: Callable[[Manifest], str],
) -> Manifest:
    """Make a bundle of `folder`, which holds the variants' files: golden samples, model card,
    and last the manifest.

    Args: origin: where the golden images come from; probes: the made-up pictures that go with them; card: ->
    README.md, from the manifest without `files`. Raises CheckError where an ONNX file carries another
    contract.
    """
    manifest = Manifest(
        schema=SCHEMA,
        target=target,
        classes=list(classes),
        input=input,
        outputs=list(outputs),
        source=source,
        variants=list(variants),
        golden=write_golden(folder, golden, origin, probes),
        files={},
        toolchain=toolchain,
        calibration=calibration,
        verified_on=verified_on,
        refused=list(refused) or msgspec.UNSET,
    )
    for variant in variants:
        if variant.file.endswith(".onnx"):
            carries_contract(folder / variant.file, manifest)
    write_atomically(folder / "README.md", card(manifest))
    manifest = msgspec.structs.replace(manifest, files=file_records(folder))
    write_manifest(folder, manifest)
    return manifest
