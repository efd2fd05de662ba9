"""What lies in a bundle's folder: its files by their hashes, its golden samples,
its variants as sessions nobody has judged.

`ffl_deploy.bundle.Bundle` adds the judgement: a session that it hands out has given PyTorch's answers.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ffl_deploy.arrays import read_arrays
from ffl_deploy.contract import carries_contract
from ffl_deploy.errors import CheckError, UsageError, choices_sentence
from ffl_deploy.files import replace_file, sha256_of
from ffl_deploy.manifest import DEFAULT_VARIANT, MANIFEST, Golden, Manifest, Variant
from ffl_deploy.preprocessing import Preprocessing
from ffl_deploy.probes import COUNT, MEMBERS, Probes, files_of
from ffl_deploy.runtime import Session, open_session

GOLDEN = "golden.npz"
AUTO = "auto"
"""In place of a variant's name: the fastest one that holds its gate on this machine."""


class GoldenSamples(NamedTuple):
    images: np.ndarray  # uint8 [n, height, width, 3]
    labels: np.ndarray  # int64 [n]; -1 where a label is not known
    logits: np.ndarray  # float32 [n, classes]: PyTorch's


class BundleFiles:
    """A bundle's manifest and files: found, hashed before they are used, opened without a judgement."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

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
            raise UsageError(
                f"{self.folder} has no variant {wanted!r}. {choices_sentence(wanted, [*variants, AUTO])}"
            )
        return variants[wanted]

    def checked_file(self, name: str) -> Path:
        """-> path of a listed file whose content has the recorded hash. Raises CheckError;
        call it before opening a model."""
        path, record = self.folder / name, self.manifest.files[name]
        if not path.is_file():
            raise CheckError(f"{path} is missing; export the bundle again or copy it completely.")
        if path.stat().st_size != record.bytes or sha256_of(path) != record.sha256:
            raise CheckError(
                f"{path} was changed since export (SHA-256 differs); export the bundle again or copy it anew."
            )
        if name in self._models:
            carries_contract(self.folder / self._models[name], self.manifest)
        return path

    @cached_property
    def _models(self) -> dict[str, str]:
        """A variant's file -> the ONNX file that carries its contract: itself, or what an engine was built
        from."""
        models = {}
        for variant in self.manifest.variants:
            source = variant.details.engine.source if variant.details.engine else variant.file
            if source.endswith(".onnx") and source in self.manifest.files:
                models[variant.file] = source
        return models

    @cached_property
    def bound(self) -> bool:
        """Whether every model carries what the manifest says of it; older bundles' do not. Raises
        CheckError."""
        carried = [carries_contract(self.folder / model, self.manifest) for model in {*self._models.values()}]
        return bool(carried) and all(carried)

    @property
    def temperature(self) -> float:
        """What the graph divides the logits by before the softmax."""
        calibration = self.manifest.calibration
        return 1.0 if calibration is None else calibration.temperature

    def golden(self) -> GoldenSamples:
        """-> the golden samples, after a check of their hash and shapes. Raises CheckError."""
        path = self.checked_file(self.manifest.golden.file)
        arrays = read_arrays(path, GoldenSamples._fields, optional=())
        samples = GoldenSamples(**{name: arrays[name] for name in GoldenSamples._fields})
        size, count = self.preprocessing, len(np.atleast_1d(samples.labels))
        shapes = [(count, size.height, size.width, 3), (count,), (count, len(self.classes))]
        kinds = [
            samples.images.dtype == np.uint8,
            samples.labels.dtype.kind in "iu",
            samples.logits.dtype.kind == "f",
        ]
        if [array.shape for array in samples] != shapes or not all(kinds) or count == 0:
            found = ", ".join(
                f"{name} {array.dtype} {list(array.shape)}" for name, array in samples._asdict().items()
            )
            raise CheckError(
                f"{path} does not hold samples of this bundle ({found}); export the bundle again."
            )
        return samples

    def probes(self) -> Probes | None:
        """-> the made-up pictures that go with the golden samples, None in bundles from before there were
        any. Raises CheckError."""
        path = self.checked_file(self.manifest.golden.file)
        arrays = read_arrays(path, optional=MEMBERS)
        if not arrays:
            return None
        size, found = self.preprocessing, [arrays[name] for name in MEMBERS[-2:] if name in arrays]
        shapes = [(COUNT, size.height, size.width, 3), (COUNT, len(self.classes))]
        kinds = [array.dtype.kind for array in found]
        if len(arrays) < len(MEMBERS) or [array.shape for array in found] != shapes or kinds != ["u", "f"]:
            raise CheckError(f"{path} does not hold this bundle's sample pictures; export the bundle again.")
        return Probes(files_of(arrays), *found)

    def open(
        self, variant: str | None = None, runtime: str | None = None, threads: int | None = None
    ) -> Session:
        """-> a new Session on `variant` (fp32) with `runtime` (the variant's own),
        using `threads` cores (all).

        Nothing is asked of it yet: for callers who judge it themselves, or ask it nothing but the time.
        Raises UsageError (unknown or missing runtime, a file it does not read), CheckError (file changed,
        model refused).
        """
        return open_session(self, self.variant(variant), runtime=runtime, threads=threads)


def write_golden(folder: Path, samples: GoldenSamples, origin: str, probes: Probes | None = None) -> Golden:
    """Write `folder/golden.npz` and return its record;
    equal samples give equal bytes (NumPy dates no member)."""
    path = folder / GOLDEN
    arrays: dict[str, Any] = samples._asdict() | ({} if probes is None else probes.arrays())
    with replace_file(path) as file:
        np.savez_compressed(file, **arrays)
    return Golden(GOLDEN, sha256_of(path), len(samples.labels), origin)
