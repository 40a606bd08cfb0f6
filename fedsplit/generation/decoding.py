"""Text generation by a client. First the prompts, then each new token, pass through bottom, trunk and top.

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
class ClientHalf:
    """A client's half of the model, and the client's link to the trunk.

    Attributes:
        client: Number of the client.
        bottom: The first blocks, in evaluation mode.
        top: The last blocks and the head, in evaluation mode.
        link: The connection to the trunk.
        caches: False for a type of model whose keys and values cannot be kept between tokens. Each token then computes
            the whole text, which must be alone in its batch.
    """

    client: int
    bottom: Bottom
    top: Top
    link: Link
    caches: bool = True


@dataclass
class Throughput:
    """Numbers of tokens and seconds, for prompts and for new tokens. Times include the choice of tokens.

    Attributes:
        read: Number of prompt tokens.
        read_seconds: Seconds until the first token after each prompt was known.
        written: Number of new tokens without the first token of each text. The prompt's pass gives the first token.
        written_seconds: Seconds for the tokens in `written`.
        passes: Number of passes through the three parts for the tokens in `written`. A pass serves a whole batch.
        texts: Number of texts begun.
    """

    read: int = 0
    read_seconds: float = 0.0
    written: int = 0
    written_seconds: float = 0.0
    passes: int = 0
    texts: int = 0

    def add_pass(self, *, of_prompts: bool, tokens: int, seconds: float) -> None:
        """Adds a pass through the three parts.

        Args:
            of_prompts: True if the pass read the prompts, False if it wrote a token of each text.
            tokens: Number of tokens read or written.
            seconds: Duration of the pass in seconds.

        Example:
            >>> throughput = Throughput()
            >>> throughput.add_pass(of_prompts=True, tokens=12, seconds=0.5)
            >>> throughput.add_pass(of_prompts=False, tokens=2, seconds=0.1)
            >>> throughput.read, throughput.written, throughput.passes
            (12, 2, 1)
        """
        if of_prompts:
            self.read += tokens
            self.read_seconds += seconds
        else:
            self.written += tokens
            self.written_seconds += seconds
            self.passes += 1


class DecodingSession:
    """A batch of growing texts. Client and trunk keep the keys and values of all earlier tokens.

    A session is a context manager. At the end of the context the trunk frees the session's keys and values.
    """

    def __init__(self, half: ClientHalf, mask: Tensor | None = None) -> None:
        """Begins a session. Nothing is sent yet.

        Args:
            half: The client's half of the model.
            mask: Mask of the prompts (B, T), 0 on padding, which is on the left; None without padding.
        """
        self._half = half
        self._begin(mask)

    def __enter__(self) -> DecodingSession:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # After an error the link itself may be broken. The lease of the session then frees the trunk's share.
        if error in (None, GeneratorExit):
            self._end()

    def _begin(self, mask: Tensor | None) -> None:
        """Begins with empty caches, under a new name: a trunk refuses steps of a session that has ended."""
        self._mask = mask
        self._ids = torch.empty(0)
        self._seen = None
        if mask is not None:
            virtual = self._half.bottom.virtual  # virtual tokens come before the padding, as in PEFT
            self._seen = nn.functional.pad(mask, (virtual, 0), value=True)
        self._bottom = Past(self._half.bottom, self._seen)
        self._top = Past(self._half.top, self._seen)
        # Not from the run's seed: two processes that write text at the same time must not share a name.
        self._session = secrets.token_hex(8)
        self._steps = 0

    def _end(self) -> None:
        """Ends the session at the trunk."""
        if self._steps and self._half.caches:  # without a step, the trunk does not know the session
            self._half.link.end(self._key())

    def _key(self) -> StepKey:
        return StepKey(0, self._half.client, self._steps, session=self._session)  # round 0: text belongs to no round

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Passes tokens through bottom, trunk and top.

        Args:
            ids: At the first step the prompts (B, T), then the next token of each text (B, 1).

        Returns:
            Logits of the following token of each text (B, V).
        """
        if not self._half.caches:
            self._ids = torch.cat([self._ids, ids], 1) if self._steps else ids
            return self._without_caches()
        if self._outgrows_cache(ids):
            return self._recompute(torch.cat([self._ids, ids], 1))
        self._ids = torch.cat([self._ids, ids], 1) if self._steps else ids

        # 1. Up: the bottom computes hidden states.
        hidden = self._bottom.extend(ids)
        # 2. Down: the trunk answers, and the top predicts the next token.
        mask = None if self._steps else self._seen  # the trunk keeps the mask of the prompts
        hidden = self._half.link.evaluate(hidden, self._key(), mask)
        self._steps += 1
        # The last position alone goes through the head, whose product is the largest of all.
        last = self._top.extend(hidden)[:, -1:]
        return self._half.top.predict(last)[:, -1]

    def _without_caches(self) -> Tensor:
        """Computes the whole text so far. Returns logits of the following token (1, V)."""
        half = self._half
        # Without a session: for the trunk, each token is an evaluation of its own.
        key = StepKey(0, half.client, self._steps)
        self._steps += 1
        hidden = half.link.evaluate(half.bottom(self._ids), key)
        return half.top.logits(hidden)[:, -1]

    def _outgrows_cache(self, ids: Tensor) -> bool:
        """Returns True if rotary positions change with the next tokens, so that cached keys become useless.

        transformers compares the length of the text with the length of the cache. With virtual tokens or a prefix
        before the text, the cache is always longer, so under PEFT nothing is ever recomputed.
        """
        key = self._half.bottom.family.outgrows
        if not key or not self._steps:
            return False
        limit = getattr(self._half.bottom.config, key, None)
        length = self._ids.shape[1] + ids.shape[1]
        return limit is not None and self._bottom.length <= limit < length

    def _recompute(self, ids: Tensor) -> Tensor:
        """Computes all tokens so far anew, in a new session, as transformers does."""
        mask = self._mask
        if mask is not None:
            new = ids.shape[1] - mask.shape[1]
            mask = nn.functional.pad(mask, (0, new), value=True)
        self._end()
        self._begin(mask)
        return self.step(ids)


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Pads prompts on the left to one batch.

    Args:
        prompts: Token ids of each prompt.

    Returns:
        Token ids (B, T), and the mask (B, T), False on padding; None in place of the mask without padding.

    Example:
        >>> ids, mask = padded([[5, 6, 7], [8]])
        >>> ids.tolist(), mask.tolist()
        ([[5, 6, 7], [0, 0, 8]], [[True, True, True], [False, False, True]])
    """
    longest = max(map(len, prompts))
    # Any token would do on padding. Every vocabulary has a token 0, and the mask hides it.
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        begin = longest - len(prompt)
        ids[row, begin:] = torch.tensor(prompt)
        mask[row, begin:] = True
    return ids, None if mask.all() else mask


def depends_on_neighbours(bottom: Bottom) -> bool:
    """Returns True if the text of a sequence depends on the longest prompt of the batch.

    The longest prompt decides the rotary positions of all sequences under LongRoPE (2402.13753), and the padding
    between virtual tokens and the text.
    """
    if bottom.virtual:
        return True
    parameters = getattr(bottom.config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, Mapping)]
    return any(rope.get("rope_type") == "longrope" for rope in (parameters, *by_layer_type))


def decode(
    half: ClientHalf,
    prompts: Sequence[Sequence[int]],
    most: int,
    stops: Sequence[int],
    choose: Chooser,
    throughput: Throughput,
) -> Generator[list[int | None], None, None]:
    """Continues several texts as one batch.

    An ended text stays in the batch, as padding, until the last text ends, as in transformers.

    Args:
        half: The client's half of the model.
        prompts: Token ids of each prompt, at least one.
        most: Largest number of new tokens of each text.
        stops: Token ids that end a text.
        choose: Function that chooses tokens by logits.
        throughput: Record of tokens and seconds. The function adds to the record.

    Yields:
        The next token of each text; None for an ended text.
    """
    ids, mask = padded(prompts)
    running = [True] * len(prompts)
    throughput.texts += len(prompts)
    with DecodingSession(half, mask) as session:
        for step in range(most):
            started = time.perf_counter()
            chosen = choose(session.step(ids))
            seconds = time.perf_counter() - started

            is_first = step == 0
            count = sum(map(len, prompts)) if is_first else sum(running)
            throughput.add_pass(of_prompts=is_first, tokens=count, seconds=seconds)

            tokens = chosen.tolist()
            # With the token that ends a text: the caller decides whether it is shown.
            yield [token if is_running else None for token, is_running in zip(tokens, running, strict=True)]

            for row, token in enumerate(tokens):
                running[row] = running[row] and token not in stops
            if not any(running):
                return
            next_tokens = list(tokens)
            for row, is_running in enumerate(running):
                if not is_running:
                    next_tokens[row] = stops[0]  # padding; an ended text's cache is never read again
            ids = torch.tensor(next_tokens)[:, None]
