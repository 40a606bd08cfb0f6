"""A client that generates text: the prompts through bottom, trunk and top once, then a token of each at a time.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsplit.client.link import Link
from fedsplit.generation.sampling import Chooser
from fedsplit.model.caches import Past
from fedsplit.model.parts import Bottom, Top
from fedsplit.wire.packets import StepKey


@dataclass(frozen=True)
class Ends:
    """What a client has of the model, and its way through the rest.

    Attributes:
        client: Its number.
        bottom: The first blocks, in evaluation mode.
        top: The last blocks and the head, in evaluation mode.
        link: The way through the trunk.
    """

    client: int
    bottom: Bottom
    top: Top
    link: Link


@dataclass
class Pace:
    """What went through the split, and in what time; choosing tokens included.

    Attributes:
        read: Tokens of prompts.
        read_seconds: Until the first token after each prompt was known.
        written: Tokens that were generated after the first of each text, which is the prompt's.
        written_seconds: What these took.
        passes: How often the three parts computed for them, for all sequences of a batch at once.
        texts: Texts that were begun.
    """

    read: int = 0
    read_seconds: float = 0.0
    written: int = 0
    written_seconds: float = 0.0
    passes: int = 0
    texts: int = 0


class Walk:
    """A batch of sequences on their way: each of the three parties remembers what it has computed.

    Used as a context, at whose end the trunk forgets them.
    """

    def __init__(self, ends: Ends, mask: Tensor | None = None) -> None:
        """Nothing has been sent yet.

        Args:
            ends: The client's side.
            mask: (B, T) of the prompts, 0 on padding, which is on the left; None where there is none.
        """
        self._ends = ends
        self._begin(mask)

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error in (None, GeneratorExit):  # else the way to the trunk may be what broke; its lease frees the session
            self._end()

    def _begin(self, mask: Tensor | None) -> None:
        self._mask, self._ids = mask, torch.empty(0)
        # Virtual tokens come before the padding, not behind it, as PEFT has it.
        virtual = self._ends.bottom.virtual
        self._seen = None if mask is None else nn.functional.pad(mask, (virtual, 0), value=True)
        self._bottom, self._top = Past(self._ends.bottom, self._seen), Past(self._ends.top, self._seen)
        self._session, self._steps = secrets.token_hex(8), 0

    def _end(self) -> None:
        if self._steps:
            self._ends.link.end(self._key())

    def _key(self) -> StepKey:
        return StepKey(0, self._ends.client, self._steps, session=self._session)

    @torch.no_grad()
    def go(self, ids: Tensor) -> Tensor:
        """The prompts (B, T), or after them one token of each (B, 1), to the logits (B, V) of what follows."""
        if self._is_outgrown(ids):
            return self._go_over(torch.cat([self._ids, ids], 1))
        self._ids = torch.cat([self._ids, ids], 1) if self._steps else ids
        # 1. Up: what the bottom makes of the tokens.
        hidden = self._bottom.extend(ids)
        # 2. Down, and through the top to what comes next.
        hidden = self._ends.link.evaluate(hidden, self._key(), None if self._steps else self._seen)
        self._steps += 1
        return self._ends.top.predict(self._top.extend(hidden)[:, -1:])[:, -1]

    def _is_outgrown(self, ids: Tensor) -> bool:
        """Whether from here on positions are turned otherwise, so that what is remembered is of no use.

        The library compares the text's own length with what is remembered; with virtual tokens or a prefix ahead of the
        text there is always more of that, so that under PEFT nothing is ever computed anew.
        """
        key, length = self._ends.bottom.family.outgrows, self._bottom.length
        limit = getattr(self._ends.bottom.config, key, None) if key and self._steps else None
        return limit is not None and length <= limit < self._ids.shape[1] + ids.shape[1]

    def _go_over(self, ids: Tensor) -> Tensor:
        """Computes everything so far anew, as the library does."""
        mask = self._mask
        if mask is not None:
            mask = nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=True)
        self._end()
        self._begin(mask)
        return self.go(ids)


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Prompts as one batch: ids (B, T), padded on the left, and the mask (B, T), None where nothing is padded."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, None if mask.all() else mask.bool()


def depends_on_neighbours(bottom: Bottom) -> bool:
    """Whether what a text becomes depends on the longest of its batch.

    That one decides how the positions of all are turned, as LongRoPE does (2402.13753), or how much padding there is
    between virtual tokens and the text.
    """
    if bottom.virtual:
        return True
    found = getattr(bottom.config, "rope_parameters", None) or {}
    ropes = [rope for rope in (found, *found.values()) if isinstance(rope, Mapping)]
    return any(rope.get("rope_type") == "longrope" for rope in ropes)


def decode(
    ends: Ends, prompts: Sequence[Sequence[int]], most: int, stops: Sequence[int], choose: Chooser, pace: Pace
) -> Generator[list[int | None], None, None]:
    """Goes on with some texts, all at once.

    A sequence that has ended takes part, as padding, until the last one has, as it does in the library.

    Args:
        ends: The client.
        prompts: The tokens of each, one at least.
        most: New tokens of each at most.
        stops: Tokens that end a text.
        choose: Chooses tokens.
        pace: What is done is added to it.

    Yields:
        The next token of each text; None of those that have ended.
    """
    ids, mask = padded(prompts)
    running = [True] * len(prompts)
    pace.texts += len(prompts)
    with Walk(ends, mask) as walk:
        for step in range(most):
            started = time.perf_counter()
            chosen = choose(walk.go(ids))
            _record(pace, step, running, prompts, time.perf_counter() - started)
            found = chosen.tolist()
            yield [token if runs else None for token, runs in zip(found, running, strict=True)]
            running = [runs and token not in stops for token, runs in zip(found, running, strict=True)]
            if not any(running):
                return
            ids = torch.tensor([[t if runs else stops[0]] for t, runs in zip(found, running, strict=True)])


def _record(pace: Pace, step: int, running: Sequence[bool], prompts: Sequence[Sequence[int]], seconds: float) -> None:
    if not step:
        pace.read += sum(map(len, prompts))
        pace.read_seconds += seconds
        return
    pace.written += sum(running)
    pace.written_seconds += seconds
    pace.passes += 1
