"""Gradients of clients that wait: for the other parts of the step, for a barrier, or for a clipping coefficient."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedsplit.optimization.clipping import squared_norm
from fedsplit.trunk.trainable import AdapterSnapshot, TrainableAdapter
from fedsplit.wire.packets import StepKey


@dataclass
class GradientSum:
    """Sum of a client's gradients since the last step of the optimiser.

    Example:
        >>> import torch
        >>> whole = GradientSum(gradients={"layer": torch.tensor([1.0])})
        >>> whole.sum_with({"layer": torch.tensor([2.0])})["layer"].tolist(), whole.gradients["layer"].tolist()
        ([3.0], [1.0])

    Attributes:
        parts: Number of gradients by optimiser step.
        rates: Share of the learning rate by optimiser step.
        gradients: The sum by exported name.
        snapshots: Snapshots of the forwards that the gradients belong to.
    """

    parts: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    rates: dict[tuple[int, int, int], float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    snapshots: list[AdapterSnapshot] = field(default_factory=list)

    def add(
        self,
        key: StepKey,
        rate: float,
        snapshot: AdapterSnapshot,
        gradients: Mapping[str, Tensor],
    ) -> None:
        """Adds the gradient of one step, or of a part of a step."""
        self.parts[key.turn] += 1
        self.rates[key.turn] = rate
        if not any(snapshot is known for known in self.snapshots):  # by identity: equality would compare tensors
            self.snapshots.append(snapshot)
        self.gradients = self.sum_with(gradients)

    def sum_with(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a new sum by exported name, with further gradients added."""
        # Out of place: the caller may still refuse the sum, and the former sum must then be unchanged.
        total = dict(self.gradients)
        for name, gradient in gradients.items():
            total[name] = total[name] + gradient if name in total else gradient
        return total


@dataclass(frozen=True)
class UnclippedGradient:
    """Gradient of a client's step that waits for its clipping coefficient.

    Attributes:
        adapter: Adapter to train.
        whole: Sum over all parts of the step.
        key: The step.
        rate: Share of the learning rate for the step.
    """

    adapter: TrainableAdapter
    whole: GradientSum
    key: StepKey
    rate: float

    @functools.cached_property
    def squared(self) -> float:
        """Squared norm over the trunk's adapter, in float64."""
        return squared_norm(self.whole.gradients.values())
