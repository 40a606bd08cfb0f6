"""Chooses the next token of a text: the likeliest token, or a token drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fedsplit.seeds import derive_seed


@dataclass(frozen=True)
class Sampling:
    """Options for the choice of tokens.

    Attributes:
        temperature: Divisor of the logits before a token is drawn; 0 takes the likeliest token.
        top_k: Number of likeliest tokens to draw from; 0 for all tokens.
        top_p: Total probability of the smallest set of likeliest tokens to draw from (1904.09751); 1 for all tokens.
        seed: Seed of the draws.

    Example:
        >>> choose = Chooser(Sampling(temperature=0.8, top_k=1), prompts=[0])
        >>> choose(torch.tensor([[0.1, 2.0, 0.3]])).tolist()  # one candidate: the draw is certain
        [1]
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Chooser:
    """Chooses the next token of each sequence in a batch.

    Each sequence has a random generator, so that a text does not depend on further texts in the batch.

    Example:
        >>> choose = Chooser(Sampling(temperature=0.0), prompts=[0])
        >>> choose(torch.tensor([[0.1, 2.0, 0.3]])).tolist()
        [1]
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[int]) -> None:
        """Seeds the generators.

        Args:
            sampling: Options of the choice.
            prompts: Number of each sequence's prompt among all prompts, for the seed of the generator.
        """
        self._draws = sampling.temperature > 0
        self._warp = LogitsProcessorList()
        if self._draws and sampling.temperature != 1:  # a division by 1 changes nothing, and costs a pass
            self._warp.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self._warp.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warp.append(TopPLogitsWarper(sampling.top_p))
        seeds = [derive_seed(sampling.seed, "prompt", number) for number in prompts]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        """Returns the ids of the chosen tokens (B,), given logits (B, V)."""
        scores = logits.float()
        if not self._draws:
            return scores.argmax(-1)

        # The library's warpers also take the tokens so far, but the three warpers above ignore the tokens.
        no_tokens = torch.empty(len(scores), 0, dtype=torch.long)
        probabilities = torch.softmax(self._warp(no_tokens, scores), -1)
        drawn = []
        for row, generator in zip(probabilities.split(1), self._generators, strict=True):
            drawn.append(torch.multinomial(row, 1, generator=generator))
        return torch.cat(drawn).squeeze(1)
