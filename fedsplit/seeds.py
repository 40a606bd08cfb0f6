"""Random numbers: who draws, draws from a seed of its own."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *path: object) -> int:
    """A seed of its own for each place that draws random numbers, independent of the order they draw in.

    Args:
        seed: The run's seed.
        *path: What names the place, such as ("client", 3, "round", 2).

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
