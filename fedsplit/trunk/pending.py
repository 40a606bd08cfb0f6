"""Pending batches: the trunk has computed their forward, and has not received all of their gradients.

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
from fedsplit.trunk.trainable import AdapterSnapshot, TrainableAdapter
from fedsplit.wire.packets import Packet, StepKey


@dataclass(frozen=True)
class Output:
    """Result of a forward, with its autograd graph.

    Attributes:
        hidden: Hidden states of all steps (N, T, D).
        sums: Router sums by step, of the steps that have an auxiliary loss.
    """

    hidden: Tensor
    sums: Mapping[StepKey, RouterSums]


@dataclass(eq=False)
class PendingBatch:
    """Steps of one client, or of several, that were computed as one forward and wait for gradients.

    Attributes:
        inputs: Hidden states (B, T, D) by step as they came; leaves of the graph.
        masks: Masks (B, T) by step, of the steps that have padding.
        adapter: Adapter that the gradient of this batch trains.
        snapshot: Snapshot of that adapter which the forward was computed with.
        seed: Seed of the forward's dropout.
        sums: Sums of the bottom's routers by step, of the steps that have an auxiliary loss.
        output: Result with its graph; None where the forward must be computed again.
        spent: True once one backward was made; gradients that come later are late.
        spoilt: Steps that are left out, since their values would spoil the gradient of the others.
    """

    inputs: dict[StepKey, Tensor]
    masks: dict[StepKey, Tensor]
    adapter: TrainableAdapter
    snapshot: AdapterSnapshot
    seed: int
    sums: dict[StepKey, RouterSums] = field(default_factory=dict)
    output: Output | None = None
    spent: bool = False
    spoilt: set[StepKey] = field(default_factory=set)

    def only(self, key: StepKey) -> PendingBatch:
        """Returns one of the steps as a batch of its own, with the same snapshot of the adapter."""
        masks = {key: self.masks[key]} if key in self.masks else {}
        sums = {key: self.sums[key]} if key in self.sums else {}
        return PendingBatch({key: self.inputs[key]}, masks, self.adapter, self.snapshot, self.seed, sums)

    @property
    def tokens(self) -> int:
        """Number of tokens of all steps, the padding within each step included."""
        return sum(hidden.shape[0] * hidden.shape[1] for hidden in self.inputs.values())

    def join(self) -> tuple[Tensor, Tensor | None]:
        """Joins all inputs, shorter sequences padded at the end, which no earlier token can attend to.

        Returns:
            Hidden states (N, T, D); and a mask (N, T), None where no step has one.
        """
        length = max(hidden.shape[1] for hidden in self.inputs.values())
        rows = [nn.functional.pad(hidden, (0, 0, 0, length - hidden.shape[1])) for hidden in self.inputs.values()]
        if not self.masks:
            return rows[0] if len(rows) == 1 else torch.cat(rows), None

        unpadded = {
            key: torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            for key, hidden in self.inputs.items()
        }
        by_step = {**unpadded, **self.masks}
        masks = [nn.functional.pad(mask, (0, length - mask.shape[1])) for mask in by_step.values()]
        return torch.cat(rows), torch.cat(masks)

    def cut(self, joined: Tensor) -> dict[StepKey, Tensor]:
        """Cuts a joined tensor (N, T, D) into the rows of each step (B, T, D)."""
        rows = joined.split([hidden.shape[0] for hidden in self.inputs.values()])
        return {key: row[:, : hidden.shape[1]] for row, (key, hidden) in zip(rows, self.inputs.items(), strict=True)}

    def spread(self, sent: Mapping[StepKey, Tensor], output: Tensor) -> Tensor:
        """Returns the gradient of the joined output; zero in the rows of steps that sent none.

        Args:
            sent: Gradients (B, T, D) by step.
            output: Joined output (N, T, D).
        """
        if len(self.inputs) == 1:
            return next(iter(sent.values()))
        # The widest of the clients' types: nobody's gradient is rounded to the type of another's.
        widest = functools.reduce(torch.promote_types, (gradient.dtype for gradient in sent.values()))
        whole = torch.zeros_like(output, dtype=widest)
        for key, place in self.cut(whole).items():
            if key in sent:
                place.copy_(sent[key])
        return whole


def dropout_seed(seed: int, packets: Sequence[Packet]) -> int:
    """Returns the dropout seed of a forward, which depends on the run's seed and the steps' keys alone."""
    path = [(p.key.round, p.key.client, p.key.step, p.key.batch * p.micros + p.key.micro) for p in packets]
    return derive_seed(seed, "trunk", *path)
