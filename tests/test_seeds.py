"""Places that draw do not share their draws."""

from __future__ import annotations

from fedsplit.seeds import derive_seed


def test_seeds_differ_by_place_and_are_stable() -> None:
    places = [("client", 0, "round", 1), ("client", 1, "round", 1), ("client", 0, "round", 2), ()]
    seeds = {derive_seed(seed, *place) for place in places for seed in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a", 1) == 4757247737403457943
