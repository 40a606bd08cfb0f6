"""Spans: the blocks of each stage of a trunk that is cut over several processes (`--trunk.stages`)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from fedsplit.settings.config import Config
from fedsplit.settings.sections import WireSettings
from fedsplit.wire.by_role import ByRole, codec_of
from fedsplit.wire.casting import EXACT


@dataclass(frozen=True)
class Span:
    """Blocks of one stage, from `low` to `high - 1`.

    Attributes:
        low: Number of the first block.
        high: Number of the block after the last.
        is_first: True if the blocks follow the clients' bottoms.
        is_last: True if the clients' tops follow the blocks.
    """

    low: int
    high: int
    is_first: bool = True
    is_last: bool = True

    def config(self, config: Config) -> Config:
        """Returns the settings of a run in which the trunk has these blocks alone."""
        # The bounds of the stages would not fit the narrower cut, and the settings would refuse them.
        whole = replace(config.trunk, stages="")
        return replace(config, cut=f"{self.low}:{self.high}", trunk=whole)

    def codec(self, settings: WireSettings, seed: int) -> ByRole:
        """Returns the codec of the stage: the run's codecs towards clients, and exact values towards other stages.

        Args:
            settings: Settings of the wire.
            seed: Seed of the run.
        """
        # Hidden states come from below and leave above. Gradients come from above and leave below.
        faces_client = {
            ("activation", "up"): self.is_first,
            ("activation", "down"): self.is_last,
            ("gradient", "up"): self.is_last,
            ("gradient", "down"): self.is_first,
        }
        outer = codec_of(settings, seed).codecs
        return ByRole({role: codec if faces_client[role] else EXACT for role, codec in outer.items()})


def spans_of(config: Config) -> list[Span]:
    """Returns the spans of a run's trunk, from the bottom to the top.

    Example:
        >>> from fedsplit.settings.documents import build
        >>> for span in spans_of(build({"cut": "1:5", "trunk.stages": "1:2:5"})):
        ...     print(span)
        Span(low=1, high=2, is_first=True, is_last=False)
        Span(low=2, high=5, is_first=False, is_last=True)
    """
    bounds = config.trunk.stage_bounds or config.bounds
    spans = []
    for low, high in itertools.pairwise(bounds):
        spans.append(Span(low, high, low == bounds[0], high == bounds[-1]))
    return spans
