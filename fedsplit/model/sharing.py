"""Blocks that read keys and values of an earlier block, and the places at which no cut may part both.

Place p lies between the blocks p - 1 and p. A cut (LO, HI) uses the places LO and HI.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STORES, READS = "store", "reuse"
"""The library's words for a block whose keys and values are read later, and for a block that reads them."""


def sharing_of(config: PretrainedConfig) -> tuple[str | None, ...]:
    """Returns, for each block, whether the block stores or reads shared keys and values; empty for most models.

    Args:
        config: Configuration of the text decoder.

    Raises:
        ValueError: The library finds no possible source for a block that reads.
    """
    return tuple(getattr(config, "kv_sharing_modes", None) or ())


def closed_places(config: PretrainedConfig) -> frozenset[int]:
    """Returns the places between a block that stores keys and values and the last block that reads them.

    A reader takes the keys and values of the last block of its kind that stores any. The trunk could not send them on:
    only hidden states cross a cut.

    Args:
        config: Configuration of the text decoder.

    Example:
        >>> from transformers import LlamaConfig
        >>> from transformers.models.gemma4_unified import Gemma4UnifiedTextConfig
        >>> kinds = ["sliding_attention", "full_attention"] * 3
        >>> shared = Gemma4UnifiedTextConfig(num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2)
        >>> shared.kv_sharing_modes
        [None, None, 'store', 'store', 'reuse', 'reuse']
        >>> sorted(closed_places(shared)), sorted(closed_places(LlamaConfig()))
        ([3, 4, 5], [])
    """
    modes = sharing_of(config)
    if not modes:
        return frozenset()
    kinds = getattr(config, "layer_types", None) or [""] * len(modes)
    sources: dict[str, int] = {}
    closed: set[int] = set()
    for block, (mode, kind) in enumerate(zip(modes, kinds, strict=True)):
        if mode == STORES:
            sources[kind] = block
        elif mode == READS:
            closed.update(range(sources.get(kind, 0) + 1, block + 1))
    return frozenset(closed)


def listed(places: Iterable[int]) -> str:
    """Returns places in words, with runs of places joined.

    Args:
        places: Places in ascending order.

    Example:
        >>> listed([0, 1, 2, 3, 10]), listed([0, 6])
        ('0-3, 10', '0, 6')
    """
    # Within a run of neighbours, the difference between a place and its index is constant.
    runs = itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0])
    words = []
    for _, pairs in runs:
        run = [place for _, place in pairs]
        words.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(words)
