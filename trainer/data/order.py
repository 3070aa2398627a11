"""The order of rows: pseudo-random, keyed, and the same on every machine and NumPy version."""

from __future__ import annotations

import numpy as np

__all__ = ["evaluation_rows", "permutation"]

_EVALUATION = 2**64 - 1


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(size), [size] int64, that depends on (size, seed, epoch) only.

    Rows are sorted by the raw output of the counter-based generator Philox (Salmon et al., SC 2011) under
    the key (seed, epoch). NumPy keeps raw output stable between versions, ``Generator.permutation`` not.
    """
    keys = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(keys, kind="stable")


def evaluation_rows(num_valid_rows: int, max_rows: int) -> np.ndarray:
    """The held-out rows of every evaluation, whatever the run's seed and world: [≤ max_rows] int64."""
    return permutation(num_valid_rows, seed=0, epoch=_EVALUATION)[:max_rows]
