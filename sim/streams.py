"""Named random streams: one cause, one stream, so that adding a draw somewhere moves nobody else."""

import zlib

import numpy as np


def stream(seed: int, *name: str | int) -> np.random.Generator:
    """Return the random stream of one cause, e.g. ``stream(7, "lengths", 3)``.

    Words name causes (hashed), integers number instances. Equal arguments give equal streams on every platform.
    """
    key = tuple(part if isinstance(part, int) else zlib.crc32(part.encode()) for part in name)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
