"""`bundle.json`, typed to the last number: what a bundle holds, where it comes from,
and what was measured of it.

Fields that a newer version added are left out when an older one reads;
the names inside a bundle are checked before any file is opened.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import msgspec

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.familiarity import Familiarity
from ffl_deploy.files import sha256_of, write_json
from ffl_deploy.parity import ParityMetrics, ParityRecord, Verdict
from ffl_deploy.preprocessing import Preprocessing
from ffl_deploy.sets import CalibratedSets, SetLevel
from ffl_deploy.statistics import Interval, PairedDifference
from ffl_deploy.verified_on import VerifiedOn

SCHEMA = 1
MANIFEST = "bundle.json"
DEFAULT_VARIANT = "fp32"


class InputTensor(msgspec.Struct, frozen=True):
    """The graph's input. Normalisation is inside the graph:
    any client feeds the pixels that `preprocessing` gives."""

    preprocessing: Preprocessing
    name: Literal["images"] = "images"
    dtype: Literal["uint8"] = "uint8"
    layout: Literal["NHWC"] = "NHWC"
    color: Literal["RGB"] = "RGB"
    batch: Annotated[int, msgspec.Meta(ge=1)] | None = None  # the only batch size the graph takes; None: any


class OutputTensor(msgspec.Struct, frozen=True):
    """One output of the graph; `shape` uses "batch" for the dynamic dimension."""

    name: str
    shape: list[int | str]
    description: str = ""


class Source(msgspec.Struct, frozen=True):
    """Where the weights come from."""

    run: str
    checkpoint: str  # best, last or ema
    checkpoint_sha256: str
    epoch: int
    method: str
    branches: list[str]
    data: str
    parameters: int  # of this target alone


class Precision(msgspec.Struct, frozen=True):
    """What the file stores and what the processor that verified it computed in;
    they differ more often than one thinks."""

    stored: Annotated[str, msgspec.Meta(pattern="^(fp32|fp16|bf16|int8)$")]  # each has a gate
    computed: str


class AccuracyRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """Top-1 accuracy of a variant on the whole test set, paired with PyTorch's on the same images;
    shares of 1.

    right: which of the images it got right, in their order (see `statistics.packed`), so that variants and
    targets can be paired with each other; absent in bundles from before that.
    """

    value: float
    interval: Interval  # Wilson, 95 %
    n: int
    split: str
    top1_agreement: float  # with PyTorch, all images
    difference: PairedDifference
    calibration_error: float
    gate: str
    verdict: Verdict
    right: str = ""


class LatencyRecord(msgspec.Struct, frozen=True):
    """Wall time of `Session.run` on real images. The machine is part of the number."""

    p50_ms: float  # one image
    p95_ms: float
    images_per_second: dict[str, float]  # batch size -> throughput (of the median call)
    best_batch: int
    threads: int  # of the processor; 0 where a GPU computes
    machine: str  # the processor, or the GPU

    @property
    def where(self) -> str:
        """-> what it was measured on, for people."""
        return f"{self.threads} threads of {self.machine}" if self.threads else self.machine

    @property
    def best_images_per_second(self) -> float:
        """-> the throughput at `best_batch`."""
        return self.images_per_second[str(self.best_batch)]


class Candidate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One way to quantise, and how far its logits, on the CPU, are from PyTorch's on the validation split.

    golden: whether the gate holds on the golden images, by which ffl-verify judges the file.
    """

    method: str
    reduce_range: bool | None = None  # of bundles from before no weight could saturate
    float_layers: list[str]
    mean_kl: float
    top1_agreement: float
    golden: bool | None = None  # None: written before that was looked at

    @property
    def rank(self) -> tuple[bool, float]:
        """The smaller, the better: a file that ffl-verify would refuse comes behind all that it accepts."""
        return not self.golden, self.mean_kl


class Quantization(msgspec.Struct, frozen=True):
    """What was chosen among what: kept in the manifest."""

    chosen: Candidate
    candidates: list[Candidate]
    calibration_images: int
    validation_images: int


class EngineRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an engine was built by and for: the sidecar `engines/NAME.json`,
    and `details.engine` of its variant."""

    flavour: str  # tensorrt or tensorrt_rtx
    version: str
    compute_capabilities: list[str]  # "8.9"; empty: the GPU that it was built on only
    profile: dict[str, int]  # batch sizes: min, opt, max
    source: str  # the ONNX file beside it, to rebuild from
    source_sha256: str
    platform: str
    build_seconds: float
    log: list[str]  # warnings of builder and parser, and errors that did not keep it from building
    gpu: str = ""  # the model that it was built on; empty where it was built without one
    # of each optimization profile [min, opt, max]; empty: the one of `profile`
    profiles: list[list[int]] = []
    exits: list[str] = []  # of a cascade, whose two engines are in one file


class KeptInFp32(msgspec.Struct, frozen=True):
    """A node of the network that a 16-bit file computes in fp32, and why."""

    node: str
    operator: str
    reason: str


class HalfRecord(msgspec.Struct, frozen=True):
    """What the manifest keeps of a conversion. largest: the largest |value| of any tensor inside the network
    on the calibration images; limit: from which on a node stays in fp32. Both are null for bf16, whose range
    is fp32's."""

    kept_in_fp32: list[KeptInFp32]
    largest: float | None = None
    limit: float | None = None
    true_fp16: ParityMetrics | None = None  # computed as GPUs compute it


LIMIT = 2**15 - 1
ACTIVATION = 255
"""The largest activation that a kernel multiplies: of uint8 as they are, of int8 shifted by 128."""
PAIR = LIMIT // ACTIVATION
"""Largest sum of two int8 weights of one output channel, so that two products of it stay in 16 bits: 128."""


class Certificate(msgspec.Struct, frozen=True):
    """The largest |sum of two products side by side| that any kernel can meet in the file,
    of `layers` int8 layers."""

    largest_pair_sum: int
    limit: int
    layers: int

    @property
    def holds(self) -> bool:
        return self.largest_pair_sum <= self.limit


class CascadeThreshold(msgspec.Struct, frozen=True):
    """The softmax of the first exit below which an image is deferred, the promise by which it was chosen on
    held-out images (see docs/decisions.md), and what it came to on those."""

    value: float
    max_loss_points: float | None  # below the last exit's accuracy
    max_deferred: float | None  # share of images
    delta: float
    split: str
    images: int
    note: str
    deferred: float
    loss_points: float


class CascadeTimes(msgspec.Struct, frozen=True):
    """Mean milliseconds of a batch of test images, and of the same batches with every image deferred, which
    is what the last exit alone takes; in turns."""

    batch: int
    cascade_ms: float
    last_ms: float


class CascadeRecord(msgspec.Struct, frozen=True):
    """Two exits in one file. edge: reference images so near the threshold that rounding decides their exit,
    left out of the comparison; exit_agreement: of the others, with PyTorch's exits; deferred: share of the
    test images; against_last: accuracy paired with that of PyTorch's last exit on the test images."""

    exits: list[str]
    threshold: CascadeThreshold
    edge: int
    exit_agreement: float
    deferred: float
    against_last: PairedDifference
    times: list[CascadeTimes]


class Details(msgspec.Struct, frozen=True, omit_defaults=True):
    """What else is known of a variant's file; each part is there for the files
    that it says something about."""

    quantisation: Quantization | None = None
    certificate: Certificate | None = None
    half: HalfRecord | None = None
    layers: dict[str, int] | None = None  # precision -> layers that OpenVINO computes in it
    operators: dict[str, int] | None = None  # operator -> how many, after ONNX Runtime's optimisation
    # further output -> root mean square difference, in standard deviations
    extras: dict[str, float] | None = None
    engine: EngineRecord | None = None
    sets: CalibratedSets | None = None  # where --sets asked for it
    cascade: CascadeRecord | None = None  # of the target cascade
    familiarity: Familiarity | None = None  # where --familiarity asked for it


class Variant(msgspec.Struct, frozen=True):
    """One deployable file. `runtime` is the one it was verified with; `parity`, `accuracy` and `latency` are
    measurements, None where they were not made (an engine without its GPU)."""

    name: str
    runtime: str
    file: str
    sha256: str
    bytes: int
    precision: Precision
    parity: ParityRecord | None = None
    accuracy: AccuracyRecord | None = None
    latency: LatencyRecord | None = None
    details: Details = Details()

    @classmethod
    def of_file(cls, folder: Path, path: Path, name: str, runtime: str, precision: Precision) -> Variant:
        """-> the variant `name` that `path`, a file below the bundle's `folder`, is;
        nothing of it measured yet."""
        return cls(
            name,
            runtime,
            path.relative_to(folder).as_posix(),
            sha256_of(path),
            path.stat().st_size,
            precision,
        )

    @property
    def engine(self) -> EngineRecord:
        """-> what an engine was built by and for. Raises CheckError where the manifest does not say."""
        if self.details.engine is None:
            raise CheckError(f"variant {self.name} has no valid engine record; export the bundle again.")
        return self.details.engine

    @property
    def exits(self) -> list[str]:
        """-> the classifiers of a cascade, in the order of its output `exit`; empty of any other target."""
        if self.details.cascade:
            return self.details.cascade.exits
        return self.details.engine.exits if self.details.engine else []  # not measured here

    def sets(self, level: str) -> SetLevel:
        """-> what the variant promises at `level`, the name of one. Raises UsageError where it does not."""
        if self.details.sets is None:
            raise UsageError(
                f"variant {self.name} has no calibrated sets; export the bundle again with ffl-export "
                "--sets, or leave --sets out."
            )
        return self.details.sets.level(level)


class Golden(msgspec.Struct, frozen=True):
    """Samples with PyTorch's own logits, to verify an installation.
    `origin` says where the images come from."""

    file: str
    sha256: str
    count: int
    origin: str


class FileRecord(msgspec.Struct, frozen=True):
    sha256: str
    bytes: int


class Temperature(msgspec.Struct, frozen=True):
    """Temperature scaling (Guo et al. 2017),
    and the expected calibration error on the test split without and with it."""

    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    split: str = ""  # that it was fitted on
    fitted_on: int = 0  # images
    note: str = ""  # what else the split was used for
    ece_before: float | None = None
    ece_after: float | None = None


class RefusedVariant(msgspec.Struct, frozen=True):
    """A file that was asked for and did not pass: it is not in the bundle. reason: metric, limit and
    layer."""

    name: str
    reason: str


class Manifest(msgspec.Struct, frozen=True):
    """`bundle.json`. `files` lists every file of the folder but the manifest itself."""

    schema: int
    target: str
    classes: list[str]
    input: InputTensor
    outputs: list[OutputTensor]
    source: Source
    variants: list[Variant]
    golden: Golden
    files: dict[str, FileRecord]
    toolchain: dict[str, str]
    calibration: Temperature | None = None
    # left out of bundles made before it was recorded
    verified_on: list[VerifiedOn] | msgspec.UnsetType = msgspec.UNSET
    refused: list[RefusedVariant] | msgspec.UnsetType = msgspec.UNSET  # absent where nothing was


def read_manifest(path: Path) -> Manifest:
    """-> a manifest whose schema is known and whose names stay inside its folder. Raises CheckError."""
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if str(error).endswith("`$.calibration.temperature`"):
            raise CheckError(
                f"{path} gives the temperature no number above 0 ({error}); export the bundle again."
            ) from error
        raise CheckError(f"{path} is not a valid manifest ({error}); export the bundle again.") from error
    if manifest.schema != SCHEMA:
        raise CheckError(
            f"{path} has schema {manifest.schema}, this version reads {SCHEMA}; export the bundle again."
        )
    if not manifest.classes or not manifest.variants:
        raise CheckError(f"{path} lists no classes or no variants; export the bundle again.")
    for output in manifest.outputs:
        if output.name in ("logits", "probabilities") and output.shape[-1:] != [len(manifest.classes)]:
            raise CheckError(
                f"{path} lists {len(manifest.classes)} classes, but {output.name} of shape {output.shape}; "
                "export again."
            )
    if len(set(manifest.classes)) < len(manifest.classes):
        twice = next(name for name in manifest.classes if manifest.classes.count(name) > 1)
        raise CheckError(f"{path} has two classes called {twice!r}, whose answers could not be told apart.")
    names = [variant.name for variant in manifest.variants]
    if len(set(names)) < len(names):
        raise CheckError(f"{path} lists a variant twice; export the bundle again.")
    named = [variant.file for variant in manifest.variants] + [manifest.golden.file]
    for name in [*named, *manifest.files]:
        pure = PurePosixPath(name)
        if (
            pure.is_absolute()
            or ".." in pure.parts
            or "\\" in name
            or name != str(pure)
            or name in ("", ".", MANIFEST)
        ):
            raise CheckError(
                f"{path} names {name!r}, which is not a file inside the bundle; do not use this bundle."
            )
    for name in named:
        if name not in manifest.files:
            raise CheckError(f"{path} does not list the hash of {name}; export the bundle again.")
    hashes = [(item.file, item.sha256) for item in manifest.variants] + [
        (manifest.golden.file, manifest.golden.sha256)
    ]
    for name, sha256 in hashes:
        if manifest.files[name].sha256 != sha256:
            raise CheckError(f"{path} gives two different hashes for {name}; export the bundle again.")
    return manifest


def file_records(folder: Path) -> dict[str, FileRecord]:
    """-> name -> FileRecord of every file below `folder` but the manifest, sorted by name."""
    names = sorted(str(PurePosixPath(p.relative_to(folder))) for p in folder.rglob("*") if p.is_file())
    return {
        name: FileRecord(sha256_of(folder / name), (folder / name).stat().st_size)
        for name in names
        if name != MANIFEST
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/bundle.json`: indented, keys in the order of the schema,
    so that equal contents are equal bytes."""
    write_json(folder / MANIFEST, manifest)
