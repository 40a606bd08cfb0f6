"""Key-value caches of a part, for generated text that grows token by token.

Shapes: B sequences, T new tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fedsplit.model.devices import device_of
from fedsplit.model.parts import Part

_WINDOWED = ("gemma2", "gemma3_text")
"""Model types for which PEFT's prefix tuning creates a cache with sliding windows."""


class PartCache(DynamicCache):  # type: ignore[misc]  # the library has no types
    """Keys and values of a part's blocks.

    Attention modules use the block's number in the unsplit model, since some modules scale by the number. The part's
    configuration, the library's source of windows and masks, counts blocks from 0. `PartCache` converts between both
    numbers.

    Attributes:
        length: Number of positions so far. `Past` sets the number, since the cache of a part without blocks cannot
            count.
    """

    def __init__(self, part: Part, rows: int = 1) -> None:
        """Creates a cache that contains the trained past, if the part has one, and nothing else.

        Args:
            part: The part.
            rows: Number B of sequences, for a part with a trained past.
        """
        windows = bool(part.blocks) and (not part.ahead or part.config.model_type in _WINDOWED)
        super().__init__(config=part.config if windows else None)
        self._first = part.blocks.start
        self.length = part.ahead
        blocks = getattr(part.decoder, part.family.blocks)
        for block, (keys, values) in enumerate(part.past(rows)):
            device = device_of(blocks[block])  # the blocks may be on several devices
            self.update(keys.to(device), values.to(device), block + self._first)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds keys and values of a block, and returns all keys and values that the block may attend to.

        `layer_idx` is the block's number in the unsplit model.
        """
        return super().update(key_states, value_states, layer_idx - self._first, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of positions so far. `layer_idx` is the block's number in the part."""
        return int(super().get_seq_length(layer_idx)) if self.layers else self.length


class Past:
    """A part with the key-value cache of a batch of sequences.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> from fedsplit.model.split import load_parts
        >>> (bottom,) = load_parts(BUNDLED_MODEL, (1, 5), ["bottom"])
        >>> past = Past(bottom)
        >>> past.extend(torch.tensor([[3, 4, 5]])).shape  # a prompt
        torch.Size([1, 3, 128])
        >>> past.extend(torch.tensor([[6]])).shape  # the next token
        torch.Size([1, 1, 128])
        >>> past.length
        4
    """

    def __init__(self, part: Part, mask: Tensor | None = None) -> None:
        """Starts without any positions.

        Args:
            part: The part. Its weights must not change while the cache is in use.
            mask: Mask (B, T) of the first input, 0 on padding; None without padding. Padding must be on the left.
                The mask includes virtual tokens before the text.
        """
        self._part = part
        self._mask = None if mask is None or bool(mask.all()) else mask.bool()
        self._cache: PartCache | None = None  # made by the first call, which tells the number of sequences

    @property
    def length(self) -> int:
        """Number of positions so far, including padding and the trained past."""
        return self._part.ahead if self._cache is None else self._cache.length

    @torch.no_grad()
    def extend(self, start: Tensor) -> Tensor:
        """Computes the hidden states (B, T, D) of new tokens (B, T), or of new hidden states (B, T, D).

        The first call on a bottom with P virtual tokens returns (B, P + T, D).
        """
        rows, count = start.shape[:2]
        if self._cache is None:
            self._cache = PartCache(self._part, rows)
        elif self._mask is not None:
            # Only prompts are padded: every later token is text.
            of_text = self._mask.new_ones(rows, count)
            self._mask = torch.cat([self._mask, of_text], 1)
        mask = self._mask
        if mask is not None and self._part.ahead:
            # Every token may attend to the trained past, also a token of a padded sequence.
            mask = nn.functional.pad(mask, (self._part.ahead, 0), value=True)
        positions = self._positions(count, start.device)
        output = self._part.extend(start, mask, positions, self._cache)
        self._cache.length += output.shape[1]  # a bottom with virtual tokens returns more positions than it got
        return output

    def _positions(self, count: int, device: torch.device) -> Tensor | None:
        """Returns the positions of new tokens in their sequences. Position 0 is the first token after the padding.

        Returns None if virtual tokens precede the text. PEFT then leaves positions to the library, which counts the
        padding between virtual tokens and text, unless the family derives positions from the mask.
        """
        if self._part.virtual:
            return None
        if self._mask is None:
            return torch.arange(self.length, self.length + count, device=device)[None]
        # Padding would get position -1, which learned positions do not have. Any position does, since padding is
        # masked.
        text = (self._mask.cumsum(1) - 1).clamp(min=0)
        return text[:, self.length - self._part.ahead :] + self._part.ahead

    @property
    def nbytes(self) -> int:
        """Size of all keys and values in bytes."""
        layers = [] if self._cache is None else self._cache.layers
        tensors = (tensor for layer in layers for tensor in (layer.keys, layer.values))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
