"""Which token comes next: the likeliest one, or one that is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fedsplit.seeds import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: What logits are divided by before a token is drawn; 0 takes the likeliest one always.
        top_k: Draws among so many of the likeliest; 0 among all.
        top_p: Draws among the fewest likeliest that have this probability together (1904.09751).
        seed: Decides what is drawn.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Chooser:
    """Chooses the next token of some sequences.

    Every sequence draws from a generator of its own, so that what it becomes does not depend on those beside it.
    """

    def __init__(self, how: Sampling, prompts: Sequence[int]) -> None:
        """Seeds the generators.

        Args:
            how: How to choose.
            prompts: The numbers of the sequences' prompts among all, which name their generators.
        """
        self._draws, self._warp = how.temperature > 0, LogitsProcessorList()
        if self._draws and how.temperature != 1:
            self._warp.append(TemperatureLogitsWarper(how.temperature))
        if how.top_k:
            self._warp.append(TopKLogitsWarper(how.top_k))
        if how.top_p < 1:
            self._warp.append(TopPLogitsWarper(how.top_p))
        self._generators = [torch.Generator().manual_seed(derive_seed(how.seed, "prompt", n)) for n in prompts]

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, V) of the next tokens to their ids (B,)."""
        scores = logits.float()
        if not self._draws:
            return scores.argmax(-1)
        # None of these looks at the tokens so far.
        odds = torch.softmax(self._warp(torch.empty(len(scores), 0, dtype=torch.long), scores), -1)
        drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(odds.split(1), self._generators, strict=True)]
        return torch.cat(drawn).squeeze(1)
