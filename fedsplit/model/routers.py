"""The loss that balances a mixture of experts (2101.03961), over the routers of all parts.

Over all layers and tokens it is E * sum_e (counts_e / rows) * (probabilities_e / rows): how often expert e was chosen,
times how likely the routers made it. Neither a sum over layers nor linear in the batch, but a function of few sums. So
these cross and not what every router said of every token: each party goes on adding where the one before it stopped,
layer by layer, as the library does, so that the result is the library's to the bit. The client's top has them all; the
loss by the summed probabilities is one gradient (E,), the same for every layer and at every party.

Shapes: E experts, N tokens of a batch, those that are padding included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SUMS = "routers"
"""What the sums, and the gradient by them, are called in a packet."""


class Routed(Protocol):
    """A part of a model, as far as its routers go."""

    @property
    def routers(self) -> Sequence[nn.Module]:
        """The routers in the order of their blocks; each returns logits (N, E) first."""
        ...

    @property
    def config(self) -> Any:
        """The library's configuration, with `num_experts` and `num_experts_per_tok`."""
        ...


@dataclass(frozen=True)
class RouterSums:
    """What routers have done with the tokens of a batch, summed over tokens and over the layers so far; float32.

    Attributes:
        probabilities: (E,), what each expert was given; has a graph where something that learns decides it.
        counts: (E,), how often each was among the chosen.
        rows: Tokens times layers, a scalar.
    """

    probabilities: Tensor
    counts: Tensor
    rows: Tensor

    @classmethod
    def none(cls, experts: int) -> RouterSums:
        """Before the first layer."""
        return cls.unpacked(torch.zeros(2 * experts + 1))

    @classmethod
    def unpacked(cls, tensor: Tensor) -> RouterSums:
        """The inverse of `packed`."""
        experts = tensor.numel() // 2
        return cls(tensor[:experts], tensor[experts:-1], tensor[-1])

    def packed(self) -> Tensor:
        """As one tensor (2E + 1,), without a graph."""
        return torch.cat([self.probabilities.detach(), self.counts, self.rows[None]])

    def as_leaf(self, takes_gradient: bool) -> RouterSums:
        """The same, with the probabilities as a leaf that may take a gradient."""
        return replace(self, probabilities=self.probabilities.detach().requires_grad_(takes_gradient))

    def after(self, heard: Sequence[Tensor], chosen: int, mask: Tensor | None = None) -> RouterSums:
        """Goes on through more layers.

        Args:
            heard: Of each layer, every token's probabilities (N, E), as `listening` has them.
            chosen: Experts that a token is sent to.
            mask: 0 on padding, of N entries in whatever shape; None where there is none.
        """
        sums = self
        flat = None if mask is None else mask.reshape(-1).float()
        for probabilities in heard:
            sums = sums._plus(probabilities, chosen, flat)
        return sums

    def _plus(self, probabilities: Tensor, chosen: int, mask: Tensor | None) -> RouterSums:
        given, experts = probabilities.float(), probabilities.topk(chosen, dim=-1).indices
        once = given.new_ones(len(given)) if mask is None else mask
        if mask is not None:
            given = given * mask.unsqueeze(-1)
        counts = torch.zeros_like(self.counts).scatter_add_(0, experts.reshape(-1), once.repeat_interleave(chosen))
        return RouterSums(self.probabilities + given.sum(dim=0), self.counts + counts, self.rows + once.sum())

    def loss(self) -> Tensor:
        """The auxiliary loss, a scalar: the number of experts chosen where they are evenly used, more where not."""
        shares = (self.counts / self.rows) * (self.probabilities / self.rows)
        return shares.sum() * self.counts.numel()


@contextlib.contextmanager
def listening(part: Routed) -> Iterator[list[Tensor]]:
    """Collects what the routers of a part say while it computes.

    Yields:
        A list that is filled layer by layer: every token's probabilities (N, E), in the type that the library would
        compute them in at that place.
    """
    heard: list[Tensor] = []

    def hear(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
        heard.append(torch.softmax(outputs[0], dim=-1))

    handles = [router.register_forward_hook(hear) for router in part.routers]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Passage:
    """A forward through one part.

    Attributes:
        sums: The routers' sums behind it, once it is over; None where no auxiliary loss is wanted.
    """

    sums: RouterSums | None = None


@dataclass
class RouterLoss:
    """The auxiliary loss as a client adds it to its own.

    Attributes:
        coefficient: What it is multiplied by; 0 where there is none.
        seen: What it was so far, without the coefficient: a scalar for each micro-batch, times the share in its batch.
    """

    coefficient: float = 0.0
    seen: list[Tensor] = field(default_factory=list)

    @contextlib.contextmanager
    def through(self, part: Routed, mask: Tensor | None, before: RouterSums | None = None) -> Iterator[Passage]:
        """Sums up a forward of a part that is made within it.

        Args:
            part: The bottom or the top.
            mask: (B, T), 0 on padding.
            before: The sums of the parts before it.
        """
        passage = Passage()
        if not self.coefficient:
            yield passage
            return
        with listening(part) as heard:
            yield passage
        start = before or RouterSums.none(part.config.num_experts)
        passage.sums = start.after(heard, part.config.num_experts_per_tok, mask)

    def added(self, loss: Tensor, passage: Passage, share: float) -> Tensor:
        """What a micro-batch adds to the loss of its batch.

        Each micro-batch has an auxiliary loss of its own, as under the library's accumulation of gradients: the whole
        batch's would be another number, since it is not linear.

        Args:
            loss: Its mean next-token loss, a scalar.
            passage: The way through the top.
            share: Of the batch's predicted tokens, those that are its own.
        """
        if passage.sums is None:
            return loss * share
        auxiliary = passage.sums.loss()
        self.seen.append(auxiliary.detach() * share)
        return (loss + self.coefficient * auxiliary) * share

    def mean(self, steps: int) -> float | None:
        """The mean auxiliary loss of the steps since it was asked last, without the coefficient; None if there is none.

        Args:
            steps: How many there were.
        """
        seen, self.seen = self.seen, []
        return float(torch.stack(seen).sum()) / steps if seen else None
