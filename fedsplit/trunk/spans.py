"""Spans: the blocks of each stage of a trunk that is cut over several processes (`--trunk.stages`)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from fedsplit.settings.config import Config
from fedsplit.wire.by_role import ByRole
from fedsplit.wire.casting import EXACT
from fedsplit.wire.codecs import Codec, make_codec


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

    def codec(self, name: str) -> Codec:
        """Returns the codec of the stage: the run's codec towards clients, and exact values towards other stages.

        Args:
            name: Name of the run's codec.
        """
        outer = make_codec(name)
        if self.is_first and self.is_last:
            return outer
        if not (self.is_first or self.is_last):
            return EXACT
        # Hidden states come from below and leave above. Gradients come from above and leave below.
        below = outer if self.is_first else EXACT
        above = outer if self.is_last else EXACT
        by_place = {
            ("activation", "up"): below,
            ("activation", "down"): above,
            ("gradient", "up"): above,
            ("gradient", "down"): below,
        }
        return ByRole(by_place, outer, "below" if self.is_first else "above")


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
