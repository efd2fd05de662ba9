"""NumPy's .npz files, read so that a damaged one is a sentence and never code."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ffl_deploy.errors import CheckError


def read_arrays(
    path: Path, names: Iterable[str] = (), optional: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """-> the arrays of an .npz file by their names; nothing in it is unpickled.

    Args: names: those that it must hold; optional: those that are read too where it holds them, None for
    whatever else it holds. Others are not unpacked.
    Raises CheckError where the file is damaged, is no .npz, or lacks one of `names`; OSError where it cannot
    be opened.
    """
    names = tuple(names)
    wanted = None if optional is None else {*names, *optional}
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files if wanted is None or name in wanted}
        except MemoryError:
            raise
        # Zip, deflate and NumPy's header parser raise almost anything on damaged bytes: tokenize's errors,
        # and OSError of a seek to a negative place. A lone .npy array is no archive (TypeError).
        except Exception as error:
            raise CheckError(f"{path} is damaged ({error}); write or copy it anew.") from error
    lacking = [name for name in names if name not in arrays]
    if lacking:
        raise CheckError(f"{path} holds no {' and no '.join(lacking)}; write or copy it anew.")
    return arrays
