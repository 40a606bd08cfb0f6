"""What a part remembers of sequences that grow, so that nothing of them is computed twice.

Shapes: B sequences, T new tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fedsplit.model.parts import Part

_WINDOWED = ("gemma2", "gemma3_text")
"""The types of models for which PEFT makes a trained past that knows of sliding windows."""


class PartCache(DynamicCache):  # type: ignore[misc]  # the library has no types
    """Keys and values of a part's blocks.

    The attention modules go by the number that their block has in the unsplit model, since some scale by it; the
    part's configuration, by which the library makes windows and masks, counts from 0.

    Attributes:
        length: Positions so far, as whoever extends the part counts them: without blocks, nothing else knows.
    """

    def __init__(self, part: Part, rows: int = 1) -> None:
        """Remembers nothing yet but what was trained to stand before any text.

        Args:
            part: Whose blocks.
            rows: B, where something was.
        """
        windows = not part.ahead or part.config.model_type in _WINDOWED
        super().__init__(config=part.config if windows else None)
        self._first, self.length = part.blocks.start, part.ahead
        for block, (keys, values) in enumerate(part.past(rows), self._first):
            self.update(keys, values, block)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Adds keys and values of the block with that number in the unsplit model; returns all it may look at."""
        return super().update(key_states, value_states, layer_idx - self._first, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions so far, by a block's number in the part."""
        return int(super().get_seq_length(layer_idx)) if self.layers else self.length


class Past:
    """A part, and what it remembers of a batch of sequences."""

    def __init__(self, part: Part, mask: Tensor | None = None) -> None:
        """Remembers nothing yet.

        Args:
            part: The part; its weights must stay as they are for as long as this lives.
            mask: (B, T) of what comes first, virtual tokens before the text included, 0 on padding, which must be on
                the text's left; None where there is none.
        """
        self._part = part
        self._mask = None if mask is None or bool(mask.all()) else mask.bool()
        self._cache: PartCache | None = None

    @property
    def length(self) -> int:
        """Positions so far, padding and a trained past included."""
        return self._part.ahead if self._cache is None else self._cache.length

    @torch.no_grad()
    def extend(self, start: Tensor) -> Tensor:
        """What follows: tokens (B, T), or hidden states (B, T, D), to hidden states (B, T, D).

        Of a bottom with P virtual tokens, the first call makes (B, P + T, D).
        """
        rows, count = start.shape[:2]
        if self._cache is None:
            self._cache = PartCache(self._part, rows)
        elif self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(rows, count)], 1)
        mask = self._mask
        if mask is not None and self._part.ahead:
            mask = nn.functional.pad(mask, (self._part.ahead, 0), value=True)
        output = self._part.extend(start, mask, self._positions(count, start.device), self._cache)
        self._cache.length += output.shape[1]
        return output

    def _positions(self, count: int, device: torch.device) -> Tensor | None:
        """Where the new tokens stand in their sequences, which begin after the padding.

        Not so behind virtual tokens: between them and the text padding has positions, too, unless the family's own
        positions follow the mask. PEFT leaves that to the library, and so do we.
        """
        if self._part.virtual:
            return None
        if self._mask is None:
            return torch.arange(self.length, self.length + count, device=device)[None]
        text = (self._mask.cumsum(1) - 1).clamp(min=0)
        return text[:, self.length - self._part.ahead :] + self._part.ahead

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        layers = [] if self._cache is None else self._cache.layers
        held = (tensor for layer in layers for tensor in (layer.keys, layer.values))
        return sum(tensor.nbytes for tensor in held if tensor is not None)
