"""Blocks that share keys and values."""

from __future__ import annotations

from transformers.models.gemma4_unified import Gemma4UnifiedTextConfig

from fedsplit.model.miniature import miniature
from fedsplit.model.sharing import closed_places, sharing_of

KINDS = [*["sliding_attention"] * 4, "full_attention"] * 7


def published(**changes: object) -> Gemma4UnifiedTextConfig:
    """Blocks in the order of Gemma 4's small models: 15 of 35 have keys and values of their own."""
    return Gemma4UnifiedTextConfig(
        **{"num_hidden_layers": 35, "layer_types": KINDS, "num_kv_shared_layers": 20} | changes
    )


def test_places_between_source_and_last_reader_are_closed() -> None:
    config = published()
    assert [block for block, mode in enumerate(sharing_of(config)) if mode == "store"] == [13, 14]
    assert closed_places(config) == {*range(14, 35)}
    assert closed_places(published(num_kv_shared_layers=0)) == frozenset()


def test_a_miniature_shares_as_the_large_model() -> None:
    small = miniature(published())
    modes = small.kv_sharing_modes
    assert {*zip(small.layer_types, modes, strict=True)} == {*zip(KINDS, sharing_of(published()), strict=True)}
    assert small.num_hidden_layers == 7  # each kind of block, and the last block
    assert closed_places(small) == {3, 4, 5, 6}
