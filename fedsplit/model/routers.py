"""Auxiliary loss that balances the experts of a mixture (2101.03961), over the routers of all parts.

The loss is E * sum_e (counts_e / rows) * (probabilities_e / rows). `counts_e` is the number of choices of expert e, and
`probabilities_e` the sum of the expert's probabilities, both over all layers and tokens; `rows` is tokens times layers.

The loss is neither a sum over layers nor linear in the batch, but depends on 2E + 1 sums only. So parties send the
sums, and not the routers' output for every token. Each party continues the sums of the party before, layer by layer in
the library's order, so that the result equals the library's to the bit. The client's top has the complete sums and
computes the loss. The gradient of the loss by `probabilities` (E,) is equal for all layers, and is sent back to all
parties.

Shapes: E experts, N tokens of a batch including padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUMS = "routers"
"""Name of the sums, and of the gradient by the sums, in a packet."""


class Routed(Protocol):
    """A part of a model, reduced to two properties."""

    @property
    def routers(self) -> Sequence[nn.Module]:
        """Routers in the order of the blocks. The first output of each router is logits (N, E)."""
        ...

    @property
    def config(self) -> PretrainedConfig:
        """The library's configuration, with `num_experts` and `num_experts_per_tok`."""
        ...


@dataclass(frozen=True)
class RouterSums:
    """Statistics of the routers, summed over the tokens of a batch and the layers so far, in float32.

    Attributes:
        probabilities: Sum of each expert's probabilities (E,), with an autograd graph if a trained parameter has an
            influence.
        counts: Number of choices of each expert (E,).
        rows: Number of tokens times layers, a scalar.

    Example:
        >>> sums = RouterSums.none(2).after([torch.tensor([[0.75, 0.25], [0.25, 0.75]])], chosen=1)
        >>> sums.counts, sums.loss()  # evenly used: the number of experts for a token
        (tensor([1., 1.]), tensor(1.))
    """

    probabilities: Tensor
    counts: Tensor
    rows: Tensor

    @classmethod
    def none(cls, experts: int) -> RouterSums:
        """Returns the sums before the first layer: zeros."""
        return cls.unpacked(torch.zeros(2 * experts + 1))

    @classmethod
    def unpacked(cls, tensor: Tensor) -> RouterSums:
        """Restores sums from a result of `packed`."""
        experts = tensor.numel() // 2
        return cls(tensor[:experts], tensor[experts:-1], tensor[-1])

    def packed(self) -> Tensor:
        """Returns the sums as one tensor (2E + 1,), without an autograd graph."""
        return torch.cat([self.probabilities.detach(), self.counts, self.rows[None]])

    def as_leaf(self, takes_gradient: bool) -> RouterSums:
        """Returns equal sums with `probabilities` as a leaf of the autograd graph."""
        return replace(self, probabilities=self.probabilities.detach().requires_grad_(takes_gradient))

    def after(self, heard: Sequence[Tensor], chosen: int, mask: Tensor | None = None) -> RouterSums:
        """Returns the sums with more layers added.

        Args:
            heard: Probabilities (N, E) of every token, layer by layer, from `listening`.
            chosen: Number of experts for a token.
            mask: Mask with N entries in any shape, 0 on padding; None without padding.
        """
        sums = self
        # As numbers, since padding counts 0 in every sum.
        flat = None if mask is None else mask.reshape(-1).float()
        for probabilities in heard:
            sums = sums._plus(probabilities, chosen, flat)
        return sums

    def _plus(self, probabilities: Tensor, chosen: int, mask: Tensor | None) -> RouterSums:
        """Adds one layer."""
        experts = probabilities.topk(chosen, dim=-1).indices
        weighted = probabilities.float()
        tokens = weighted.new_ones(len(weighted)) if mask is None else mask
        if mask is not None:
            weighted = weighted * mask.unsqueeze(-1)
        counts = torch.zeros_like(self.counts)
        counts.scatter_add_(0, experts.reshape(-1), tokens.repeat_interleave(chosen))  # padding counts 0
        return RouterSums(
            probabilities=self.probabilities + weighted.sum(dim=0),
            counts=self.counts + counts,
            rows=self.rows + tokens.sum(),
        )

    def loss(self) -> Tensor:
        """Returns the auxiliary loss, a scalar.

        Evenly used experts give the number of experts for a token. Uneven use gives more.
        """
        shares = (self.counts / self.rows) * (self.probabilities / self.rows)
        return shares.sum() * self.counts.numel()


@contextlib.contextmanager
def listening(part: Routed) -> Iterator[list[Tensor]]:
    """Records the output of a part's routers during a forward inside the context.

    Yields:
        A list, filled by the forward: probabilities (N, E) of every token, layer by layer, in the library's type.
    """
    heard: list[Tensor] = []

    def hear(_module: nn.Module, _inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        logits = outputs[0]
        # The router's second output has the probabilities of chosen experts only.
        heard.append(torch.softmax(logits, dim=-1))

    handles = [router.register_forward_hook(hear) for router in part.routers]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Passage:
    """Result of a forward through one part.

    Attributes:
        sums: The routers' sums after the part, at the end of the forward; None without an auxiliary loss.
    """

    sums: RouterSums | None = None


@dataclass
class RouterLoss:
    """Auxiliary loss beside a client's next-token loss.

    Attributes:
        coefficient: Factor of the auxiliary loss; 0 for no auxiliary loss.
        seen: Auxiliary losses so far, without the coefficient: a scalar for each micro-batch, weighted by the
            micro-batch's share of the batch.
    """

    coefficient: float = 0.0
    seen: list[Tensor] = field(default_factory=list)

    @contextlib.contextmanager
    def through(self, part: Routed, mask: Tensor | None, before: RouterSums | None = None) -> Iterator[Passage]:
        """Collects the routers' sums of a forward inside the context.

        Args:
            part: The bottom or the top.
            mask: Mask (B, T), 0 on padding.
            before: Sums of the earlier parts; None for the bottom.

        Yields:
            A `Passage`. The end of the context sets the sums.
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
        """Returns the share of a micro-batch in the loss of the batch, including the auxiliary loss.

        Each micro-batch has a separate auxiliary loss, as in the library's gradient accumulation. The auxiliary loss of
        the whole batch would be a different number, since the loss is not linear.

        Args:
            loss: Mean next-token loss of the micro-batch, a scalar.
            passage: Result of the forward through the top.
            share: Share of the micro-batch in the predicted tokens of the batch.
        """
        if passage.sums is None:
            return loss * share
        auxiliary = passage.sums.loss()
        self.seen.append(auxiliary.detach() * share)
        return (loss + self.coefficient * auxiliary) * share

    def mean(self, steps: int) -> float | None:
        """Returns the mean auxiliary loss of the steps since the last call, without the coefficient.

        Args:
            steps: Number of steps since the last call.

        Returns:
            The mean; None without an auxiliary loss.
        """
        seen = self.seen
        self.seen = []
        return float(torch.stack(seen).sum()) / steps if seen else None
