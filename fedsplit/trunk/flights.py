"""Forwards of which some backward has not come: the steps of one client, or of several that are computed as one.

Shapes: B sequences of T tokens a step, D the width of hidden states; joined, all rows N and the longest T.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedsplit.model.routers import RouterSums
from fedsplit.seeds import derive_seed
from fedsplit.trunk.learner import Learner, Version
from fedsplit.wire.packets import Packet, StepKey


@dataclass(frozen=True)
class Output:
    """What a forward makes, with its graph.

    Attributes:
        hidden: Of all steps (N, T, D).
        sums: Of the routers, by step, where a step has them.
    """

    hidden: Tensor
    sums: Mapping[StepKey, RouterSums]


@dataclass(eq=False)
class Flight:
    """A forward of one client, or of several at once, of which some backward has not come.

    Attributes:
        inputs: Hidden states (B, T, D) as they came, leaves of the graph, by step.
        masks: Masks (B, T) of those that are padded.
        learner: Whose adapter it is computed with.
        version: Which version of it.
        seed: Of its dropout.
        sums: Of the bottom's routers, of those that have an auxiliary loss, which is each client's own.
        output: The result with its graph; None where it must be computed again.
        spent: A backward has been made; those that come later are late.
        spoilt: Steps that are left out, since they would spoil the gradient of the others.
    """

    inputs: dict[StepKey, Tensor]
    masks: dict[StepKey, Tensor]
    learner: Learner
    version: Version
    seed: int
    sums: dict[StepKey, RouterSums] = field(default_factory=dict)
    output: Output | None = None
    spent: bool = False
    spoilt: set[StepKey] = field(default_factory=set)

    def only(self, key: StepKey) -> Flight:
        """Returns one of its steps as a flight of its own, with the same version of the adapter."""
        masks = {key: self.masks[key]} if key in self.masks else {}
        sums = {key: self.sums[key]} if key in self.sums else {}
        return Flight({key: self.inputs[key]}, masks, self.learner, self.version, self.seed, sums)

    @property
    def tokens(self) -> int:
        """Tokens of all steps, each step's own padding included."""
        return sum(hidden.shape[0] * hidden.shape[1] for hidden in self.inputs.values())

    def join(self) -> tuple[Tensor, Tensor | None]:
        """All inputs as one batch, shorter sequences padded at the end, which no earlier token can see.

        Returns:
            Hidden states (N, T, D); and a mask (N, T), None where no step has one.
        """
        length = max(hidden.shape[1] for hidden in self.inputs.values())
        rows = [nn.functional.pad(h, (0, 0, 0, length - h.shape[1])) for h in self.inputs.values()]
        if not self.masks:
            return rows[0] if len(rows) == 1 else torch.cat(rows), None
        whole = {
            key: torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            for key, hidden in self.inputs.items()
        }
        masks = [nn.functional.pad(m, (0, length - m.shape[1])) for m in {**whole, **self.masks}.values()]
        return torch.cat(rows), torch.cat(masks)

    def cut(self, joined: Tensor) -> dict[StepKey, Tensor]:
        """A joined tensor (N, T, D) to each step's own (B, T, D)."""
        rows = joined.split([hidden.shape[0] for hidden in self.inputs.values()])
        return {key: row[:, : hidden.shape[1]] for row, (key, hidden) in zip(rows, self.inputs.items(), strict=True)}

    def spread(self, sent: Mapping[StepKey, Tensor], output: Tensor) -> Tensor:
        """The gradients of some steps as one of the output; zero where none came.

        Args:
            sent: (B, T, D) by step.
            output: (N, T, D).
        """
        if len(self.inputs) == 1:
            return next(iter(sent.values()))
        # The widest of their types: nobody's is rounded to that of another.
        widest = functools.reduce(torch.promote_types, (gradient.dtype for gradient in sent.values()))
        whole = torch.zeros_like(output, dtype=widest)
        for key, place in self.cut(whole).items():
            if key in sent:
                place.copy_(sent[key])
        return whole


def dropout_seed(seed: int, packets: Sequence[Packet]) -> int:
    """What the dropout of some steps' forward is drawn from: the run's seed and the keys alone."""
    path = [(p.key.round, p.key.client, p.key.step, p.key.batch * p.micros + p.key.micro) for p in packets]
    return derive_seed(seed, "trunk", *path)
