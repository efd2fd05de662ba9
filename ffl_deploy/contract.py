"""What a bundle's manifest says of its ONNX files, carried by those files too: classes, preprocessing, input
and temperature.

The gates compare logits of pixels. A manifest whose classes were rotated, or that asks for another resize,
passes them all and answers wrongly; so every file carries what it was exported with, and nothing else is
served.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ffl_deploy.errors import CheckError
from ffl_deploy.runtime.onnx_wire import read_metadata

if TYPE_CHECKING:
    from ffl_deploy.manifest import InputTensor, Manifest

KEY = "ffl.contract"
"""Of the entry in an ONNX file's metadata that holds the contract, as JSON."""

NOT_BOUND = "its classes and preprocessing are not bound to its models (exported before they were)"


def contract(target: str, classes: Sequence[str], input: InputTensor, temperature: float) -> str:
    """-> the contract as JSON with sorted keys. The fields are named one by one: one that a newer version
    adds must not change what older files say."""
    said: dict[str, Any] = {
        "target": target,
        "classes": list(classes),
        "name": input.name,
        "dtype": input.dtype,
        "layout": input.layout,
        "color": input.color,
        "batch": input.batch,
        "height": input.preprocessing.height,
        "width": input.preprocessing.width,
        "resize": input.preprocessing.resize,
        "crop_fraction": input.preprocessing.crop_fraction,
        "filter": input.preprocessing.filter,
        "temperature": temperature,
    }
    return msgspec.json.encode(said, order="sorted").decode()


def contract_of(manifest: Manifest) -> str:
    """-> the contract of a bundle's files, by its manifest."""
    temperature = 1.0 if manifest.calibration is None else manifest.calibration.temperature
    return contract(manifest.target, manifest.classes, manifest.input, temperature)


def carries_contract(path: Path, manifest: Manifest) -> bool:
    """-> whether the ONNX file `path` carries a contract; files from before there was one do not.

    Raises CheckError where it is another one than the manifest's, naming what differs.
    """
    carried = read_metadata(path).get(KEY)
    if carried is None:
        return False
    try:
        exported = msgspec.json.decode(carried, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise CheckError(f"{path} carries a damaged contract ({error}); export the bundle again.") from error
    said = msgspec.json.decode(contract_of(manifest), type=dict[str, Any])
    differing = sorted(name for name in {*said, *exported} if said.get(name) != exported.get(name))
    if differing:
        raise CheckError(
            f"{path.name} was exported with {_shown(differing, exported)}, but the bundle's manifest says "
            f"{_shown(differing, said)}; {path.parent} was edited: export it again or copy it anew."
        )
    return True


def _shown(names: Sequence[str], values: dict[str, Any]) -> str:
    """-> "resize crop and filter bilinear"; of long values the beginning."""
    said = [f"{name} {str(values.get(name))[:60]}" for name in names]
    return " and ".join(said[:3])
