"""Seeds: every place that draws random numbers gets its seed by name from the seed of the run."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *path: object) -> int:
    """Derives a seed for a place that draws random numbers. The order in which places draw does not matter.

    Args:
        seed: Seed of the run.
        *path: Name of the place, such as ("client", 3, "round", 2).

    Returns:
        An integer in [0, 2**63).

    Example:
        >>> derive_seed(0, "client", 3) == derive_seed(0, "client", 3)
        True
        >>> derive_seed(0, "client", 3) == derive_seed(0, "client", 4)
        False
    """
    # Not Python's `hash`, which differs from process to process.
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: torch's generators take signed 64-bit seeds
