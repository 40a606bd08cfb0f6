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
        sums: Router sums by step, of the steps with an auxiliary loss.
        random: State of the random generator after the forward, for the next stage of the trunk.
    """

    hidden: Tensor
    sums: Mapping[StepKey, RouterSums]
    random: Tensor | None = None


@dataclass(eq=False)
class PendingBatch:
    """Steps of one or more clients that were computed as one forward, and wait for gradients.

    Attributes:
        inputs: Hidden states (B, T, D) from the clients, by step; leaves of the graph.
        masks: Masks (B, T) by step, for steps with padding.
        adapter: Adapter that the gradient of the batch trains.
        snapshot: Snapshot of the adapter at the forward.
        seed: Seed of the forward's dropout, or the state of the random generator after the stage below.
        sums: Sums of the bottom's routers by step, for steps with an auxiliary loss.
        output: Result with the graph; None if the backward must compute the forward again.
        spent: True after a backward. Later gradients are refused.
        spoilt: Steps that are left out. The values of a spoilt step would spoil the gradient of the whole batch.
        is_adapted: False for a forward through the base weights alone.
    """

    inputs: dict[StepKey, Tensor]
    masks: dict[StepKey, Tensor]
    adapter: TrainableAdapter
    snapshot: AdapterSnapshot
    seed: int | Tensor
    sums: dict[StepKey, RouterSums] = field(default_factory=dict)
    output: Output | None = None
    spent: bool = False
    spoilt: set[StepKey] = field(default_factory=set)
    is_adapted: bool = True

    def only(self, key: StepKey) -> PendingBatch:
        """Returns one step as a separate batch, with the snapshot of the adapter."""
        return PendingBatch(
            inputs={key: self.inputs[key]},
            masks={key: self.masks[key]} if key in self.masks else {},
            adapter=self.adapter,
            snapshot=self.snapshot,
            seed=self.seed,
            sums={key: self.sums[key]} if key in self.sums else {},
        )

    @property
    def tokens(self) -> int:
        """Number of tokens of all steps, including the padding within each step."""
        return sum(hidden.shape[0] * hidden.shape[1] for hidden in self.inputs.values())

    def join(self) -> tuple[Tensor, Tensor | None]:
        """Joins all inputs. Shorter sequences are padded at the end, where no earlier token can attend to.

        Returns:
            Hidden states (N, T, D), and a mask (N, T); None in place of the mask if no step has a mask.
        """
        length = max(hidden.shape[1] for hidden in self.inputs.values())
        rows = []
        for hidden in self.inputs.values():
            missing = length - hidden.shape[1]
            rows.append(nn.functional.pad(hidden, (0, 0, 0, missing)))  # (before, after), last dimension first
        if not self.masks:
            return rows[0] if len(rows) == 1 else torch.cat(rows), None

        masks = []
        for key, hidden in self.inputs.items():
            mask = self.masks.get(key)
            if mask is None:
                # A step without padding sends no mask, but shares the batch with one that does.
                mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            missing = length - mask.shape[1]
            masks.append(nn.functional.pad(mask, (0, missing)))
        return torch.cat(rows), torch.cat(masks)

    def cut(self, joined: Tensor) -> dict[StepKey, Tensor]:
        """Cuts a joined tensor (N, T, D) into the rows of each step (B, T, D)."""
        sizes = [hidden.shape[0] for hidden in self.inputs.values()]
        pieces = dict(zip(self.inputs, joined.split(sizes), strict=True))
        by_step = {}
        for key, hidden in self.inputs.items():
            by_step[key] = pieces[key][:, : hidden.shape[1]]  # without the padding to the longest step
        return by_step

    def spread(self, sent: Mapping[StepKey, Tensor], output: Tensor) -> Tensor:
        """Returns the gradient of the joined output, with zeros for steps without a gradient.

        Args:
            sent: Gradients (B, T, D) by step.
            output: Joined output (N, T, D).
        """
        if len(self.inputs) == 1:  # the client's gradient, in the client's type and without a copy
            return next(iter(sent.values()))
        # The widest of the clients' types, so that no client's gradient is rounded to the type of a second client's.
        kinds = [gradient.dtype for gradient in sent.values()]
        widest = functools.reduce(torch.promote_types, kinds)
        whole = torch.zeros_like(output, dtype=widest)
        for key, place in self.cut(whole).items():
            if key in sent:
                place.copy_(sent[key])
        return whole


def dropout_seed(seed: int, packets: Sequence[Packet]) -> int:
    """Returns the dropout seed of a forward, which depends on the run's seed and the steps' keys alone."""
    path = []
    for packet in packets:
        key = packet.key
        micro_batch = key.batch * packet.micros + key.micro  # counted over all batches of the step
        path.append((key.round, key.client, key.step, micro_batch))
    return derive_seed(seed, "trunk", *path)
