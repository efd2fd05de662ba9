"""Every random decision is a pure function of (seed, purpose, step):
a resumed run repeats it without stored state."""

from __future__ import annotations

import random
import zlib

import numpy as np
import torch


def derived_seed(seed: int, purpose: str, index: int = 0) -> int:
    """-> a 63-bit seed that differs between seeds, purposes and indices."""
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), index]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """-> a CPU generator of its own for one decision;
    draws on the CPU are the same whatever device trains."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, index))


def seed_everything(seed: int, purpose: str = "global", index: int = 0) -> int:
    """Seed Python, NumPy and torch, on the CPU and on the GPU that this process uses;
    -> the seed that was set.

    torch.manual_seed would also look for every other kind of device and format a stack trace for each that is
    not there: 0.2 ms, which a step on a GPU has not got.
    """
    value = derived_seed(seed, purpose, index)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - third-party transforms draw from the global state
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)
    return value
