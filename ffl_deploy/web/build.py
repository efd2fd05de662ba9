"""Bundles -> static files: the page, onnxruntime-web, chosen variants, golden samples, a hash of every file.

    DIR/  index.html  page.js ...  sw.js  page.json  files.json  runtime/  models/NAME/  probes/  examples/

A bundle's files are copied unchanged, so that a hash in `bundle.json` is also that of the page's file.
"""

from __future__ import annotations

import hashlib
import html
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.bundle_files import AUTO
from ffl_deploy.errors import UsageError
from ffl_deploy.files import replace_folder, sha256_of, write_atomically
from ffl_deploy.images import MAX_PIXELS, ImageError, load
from ffl_deploy.manifest import MANIFEST, FileRecord, Variant
from ffl_deploy.parity import PARITY_GATES, TIE, UNDIRECTED, ParityGate, gate_precision
from ffl_deploy.runtime.onnx_wire import refuse_external_data
from ffl_deploy.web.probes import Probe, write_probes
from ffl_deploy.web.runtime import VERSION, WASM, WEBGPU, Runtime, runtime_files

PAGE, RECORDS, WORKER, CARD = "page.json", "files.json", "sw.js", "README.md"
FOLDERS = ("runtime", "models", "probes", "examples")
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
GENERATOR = "ffl-web"


@dataclass(frozen=True)
class WebModel:
    """One variant of a bundle, under the name that the page shows."""

    name: str
    bundle: Bundle
    variant: Variant


@dataclass(frozen=True)
class WebOptions:
    """`runtime_folder`: instead of npm; `webgpu`: the larger runtime, for GPUs; `examples`:
    pictures to try."""

    runtime_folder: Path | None = None
    webgpu: bool = False
    examples: tuple[Path, ...] = ()


class PageModel(msgspec.Struct, frozen=True):
    """`bytes` are those of the model's file; paths are relative to the page."""

    name: str
    variant: str
    bytes: int
    manifest: str
    file: str
    golden: str
    card: str
    gate: ParityGate


class Page(msgspec.Struct, frozen=True):
    """`page.json`: what the script is told."""

    generator: str
    title: str
    runtime: dict[str, Any]
    models: list[PageModel]
    probes: list[Probe]
    examples: list[str]
    parity: dict[str, float]
    max_pixels: int


def web_models(specs: Sequence[str], variants: Sequence[str | None] = (None,)) -> list[WebModel]:
    """`BUNDLE` or `NAME=BUNDLE` each, with each variant (None: the default one) -> models.
    Raises UsageError."""
    if AUTO in variants:
        raise UsageError(
            "--variant auto is found out where the model computes; name the variant that the page shows."
        )
    models = []
    for spec in specs:
        given, equals, folder = spec.partition("=")
        named = bool(equals) and not Path(spec).exists()
        bundle = load_bundle(folder if named else spec)
        for wanted in variants:
            variant = bundle.variant(wanted)
            name = given if named else bundle.name
            models.append(WebModel(name if len(variants) == 1 else f"{name}-{variant.name}", bundle, variant))
    return models


def require_web(folder: Path, flag: str = "--out") -> None:
    """Raises UsageError unless `folder` is new, empty, or holds a page that was built here."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{flag} {folder} is a file; give a new folder.")
    if not is_page(folder) and any(not path.name.startswith(".git") for path in folder.iterdir()):
        raise UsageError(
            f"{flag} {folder} is not empty and holds no page that was built here; give a new folder."
        )


def is_page(folder: Path) -> bool:
    page = folder / PAGE
    return page.is_file() and f'"generator": "{GENERATOR}"'.encode() in page.read_bytes()


def write_web(
    models: Sequence[WebModel], folder: Path, options: WebOptions | None = None, flag: str = "--out"
) -> int:
    """Write the page into `folder`, which keeps what is not part of it; -> bytes of its files.

    Args: flag: what `folder` was given by, for the message.
    Raises UsageError where `folder` holds something else, a model or picture cannot be used,
    or npm is missing.
    """
    require_web(folder, flag)
    with replace_folder(folder) as new:
        keep_others(folder, new, own_names())
        return write_page(models, new, options)


def own_names() -> set[str]:
    """-> what lies at the top of a page's folder."""
    return {path.name for path in files("ffl_deploy.web").joinpath("page").iterdir()} | {
        PAGE,
        RECORDS,
        *FOLDERS,
    }


def keep_others(old: Path, new: Path, own: set[str]) -> None:
    """Copy what is not part of the page, such as git's files or a CNAME, from an earlier folder."""
    for kept in old.iterdir() if old.is_dir() else ():
        if kept.name not in own:
            (
                shutil.copytree(kept, new / kept.name, symlinks=True)
                if kept.is_dir()
                else shutil.copy2(kept, new)
            )


def write_page(models: Sequence[WebModel], folder: Path, options: WebOptions | None = None) -> int:
    """Write the files of a page into `folder`, which exists; -> their bytes. Raises as `write_web`."""
    options = options or WebOptions()
    _require_usable(models)
    runtime = WEBGPU if options.webgpu else WASM

    # The runtime first: it is what can be missing.
    _copy_runtime(runtime, options.runtime_folder, folder / "runtime")
    described = [_copy_model(model, folder) for model in models]
    probes = write_probes(folder)
    examples = _copy_examples(options.examples, folder)

    title = f"{' and '.join(model.name for model in models)} on {models[0].bundle.manifest.source.data}"
    page = Page(
        generator=GENERATOR,
        title=title,
        runtime={
            "version": VERSION,
            "module": f"runtime/{runtime.module}",
            "wasm": f"runtime/{runtime.wasm}",
            "webgpu": runtime.webgpu,
        },
        models=described,
        probes=probes,
        examples=examples,
        parity={"tie": TIE, "undirected": UNDIRECTED},
        max_pixels=MAX_PIXELS,
    )
    write_atomically(folder / PAGE, msgspec.json.format(msgspec.json.encode(page), indent=1) + b"\n")
    values = {"@TITLE@": html.escape(title), "@RUNTIME@": VERSION}
    _copy_sources(folder, values | {"@MODULE@": page.runtime["module"], "@WASM@": page.runtime["wasm"]})
    return _write_records(folder)


def _require_usable(models: Sequence[WebModel]) -> None:
    """Raises UsageError for names that are given twice or fit in no URL, and for what no browser runs."""
    if not models:
        raise UsageError("a page needs at least one bundle.")
    names = [model.name for model in models]
    for model in models:
        if names.count(model.name) > 1:
            raise UsageError(
                f"two models are called {model.name}; give them names: first={model.bundle.folder} ..."
            )
        if not model.name or not NAME_CHARACTERS.issuperset(model.name) or model.name in (".", ".."):
            raise UsageError(
                f"{model.name!r} cannot be a folder of a web page; give a name of letters, digits and -_. "
                f"as in cats={model.bundle.folder}"
            )
        if not model.variant.file.endswith(".onnx"):
            raise UsageError(
                f"variant {model.variant.name} of {model.name} is no ONNX file, and a browser runs no other; "
                "choose another with --variant."
            )


def _copy_runtime(runtime: Runtime, source: Path | None, target: Path) -> None:
    target.mkdir()
    with runtime_files(runtime, source) as found:
        for name, path in found.items():
            shutil.copyfile(path, target / name)
    with as_file(files("ffl_deploy.web").joinpath("onnxruntime-LICENSE.txt")) as licence:
        shutil.copyfile(licence, target / "LICENSE.txt")


def _copy_model(model: WebModel, folder: Path) -> PageModel:
    """Copy what the page needs of a bundle, each file by its hash. Raises CheckError."""
    bundle, variant = model.bundle, model.variant
    refuse_external_data(bundle.checked_file(variant.file))
    bundle.golden()
    place = PurePosixPath("models", model.name)
    named = [MANIFEST, variant.file, bundle.manifest.golden.file]
    if CARD in bundle.manifest.files:
        named.append(CARD)
    for name in named:
        source = bundle.folder / name if name == MANIFEST else bundle.checked_file(name)
        (folder / place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / place / name)
    return PageModel(
        name=model.name,
        variant=variant.name,
        bytes=variant.bytes,
        manifest=str(place / MANIFEST),
        file=str(place / variant.file),
        golden=str(place / bundle.manifest.golden.file),
        card=str(place / named[-1 if CARD in named else 0]),
        gate=PARITY_GATES[gate_precision(variant.precision.stored, variant.precision.computed)],
    )


def _copy_examples(given: Sequence[Path], folder: Path) -> list[str]:
    """Pictures, or folders of pictures -> their places in the page. Raises UsageError for what is none."""
    pictures: list[Path] = []
    for path in given:
        pictures += sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    places = []
    for number, picture in enumerate(pictures):
        try:
            load(picture)
        except ImageError as error:
            raise UsageError(f"--examples {picture} cannot be shown: {error}.") from error
        plain = "".join(character for character in picture.name if character in NAME_CHARACTERS)
        # Names that need no escape in a URL.
        place = f"examples/{plain}" if plain == picture.name else f"examples/{number + 1}-{plain}"
        if place in places:
            place = f"examples/{number + 1}-{plain}"
        (folder / "examples").mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / place)
        places.append(place)
    return places


def _copy_sources(folder: Path, values: dict[str, str]) -> None:
    """Copy the page's own files; index.html gets its values."""
    for source in files("ffl_deploy.web").joinpath("page").iterdir():
        content = source.read_bytes()
        if source.name == "index.html":
            for name, value in values.items():
                content = content.replace(name.encode(), value.encode())
        write_atomically(folder / source.name, content)


def _write_records(folder: Path) -> int:
    """Write files.json and finish the service worker, which changes with any file; -> bytes of all files."""
    names = [*own_names() - set(FOLDERS) - {WORKER, RECORDS}]
    for part in FOLDERS:
        names += [
            str(PurePosixPath(path.relative_to(folder)))
            for path in (folder / part).rglob("*")
            if path.is_file()
        ]
    records = {
        name: FileRecord(sha256_of(folder / name), (folder / name).stat().st_size) for name in sorted(names)
    }
    content = msgspec.json.format(msgspec.json.encode(records), indent=1) + b"\n"
    write_atomically(folder / RECORDS, content)
    listed = msgspec.json.encode(["./", RECORDS, *records]).decode()
    worker = (folder / WORKER).read_text().replace('["@FILES@"]', listed)
    write_atomically(folder / WORKER, worker.replace("@VERSION@", hashlib.sha256(content).hexdigest()[:16]))
    return sum(record.bytes for record in records.values())
