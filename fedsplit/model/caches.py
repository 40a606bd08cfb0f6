"""What a part remembers of sequences that grow, so that nothing of them is computed twice.

Shapes: B sequences, T new tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fedsplit.model.parts import Part


class PartCache(DynamicCache):  # type: ignore[misc]  # the library has no types
    """Keys and values of a part's blocks.

    The attention modules go by the number that their block has in the unsplit model, since some scale by it; the
    part's configuration, by which the library makes windows and masks, counts from 0.
    """

    def __init__(self, part: Part) -> None:
        """Remembers nothing yet.

        Args:
            part: Whose blocks.
        """
        super().__init__(config=part.config)
        self._first = part.blocks.start

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Adds keys and values of the block with that number in the unsplit model; returns all it may look at."""
        return super().update(key_states, value_states, layer_idx - self._first, *args, **kwargs)


class Past:
    """A part, and what it remembers of a batch of sequences.

    Attributes:
        length: Positions so far, padding included.
    """

    def __init__(self, part: Part, mask: Tensor | None = None) -> None:
        """Remembers nothing yet.

        Args:
            part: The part; its weights must stay as they are for as long as this lives.
            mask: (B, T) of what comes first, 0 on padding, which must be on the left; None where there is none.
        """
        self._part, self._cache = part, PartCache(part)
        self._mask = None if mask is None or bool(mask.all()) else mask.bool()
        self.length = 0

    @torch.no_grad()
    def extend(self, start: Tensor) -> Tensor:
        """What follows: tokens (B, T), or hidden states (B, T, D), to hidden states (B, T, D)."""
        rows, count = start.shape[:2]
        if self.length and self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(rows, count)], 1)
        output = self._part.extend(start, self._mask, self._positions(count, start.device), self._cache)
        self.length += count
        return output

    def _positions(self, count: int, device: torch.device) -> Tensor:
        """Where the new tokens stand in their sequences, which begin after the padding."""
        if self._mask is None:
            return torch.arange(self.length, self.length + count, device=device)[None]
        return (self._mask.cumsum(1) - 1).clamp(min=0)[:, self.length :]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        held = (tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values))
        return sum(tensor.nbytes for tensor in held if tensor is not None)
