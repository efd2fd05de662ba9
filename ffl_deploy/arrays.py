"""NumPy's .npz files, read so that a damaged one is a sentence and never code."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ffl_deploy.errors import CheckError


def read_arrays(path: Path, names: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """-> every array of an .npz file by its name; nothing in it is unpickled.

    Raises CheckError where the file is damaged, is no .npz, or lacks one of `names`;
    OSError where it cannot be opened.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    # TypeError: a lone .npy array is no archive; the others are what zip,
    # deflate and NumPy say of damaged bytes.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, TypeError, ValueError) as error:
        raise CheckError(f"{path} is damaged ({error}); write or copy it anew.") from error
    lacking = [name for name in names if name not in arrays]
    if lacking:
        raise CheckError(f"{path} holds no {' and no '.join(lacking)}; write or copy it anew.")
    return arrays
