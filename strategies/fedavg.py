"""FedAvg (1602.05629), which on LoRA's factors is FedIT (2305.05644).

Rule: A <- sum_i w_i A_i, B <- sum_i w_i B_i, with w_i the client's share of examples.
Needs: equal ranks. Costs: every factor up and down once a round. The average of the factors is not the
average of the products: sum_i w_i s (B_i - Bbar)(A_i - Abar) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate


class FedAvg:
    """The average of the clients' factors, weighted by examples."""

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """FedAvg remembers nothing."""
        return {}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Averages every factor in float64, in the order of the clients, and rounds once.

        Raises:
            ValueError: No client has any example.
        """
        total = sum(update.examples for update in updates)
        if total <= 0:
            raise ValueError("no client trained on any example")
        ordered = sorted(updates, key=lambda update: update.client)
        averaged = {}
        for name, before in adapters.tensors.items():
            mean = torch.zeros(before.shape, dtype=torch.float64)
            for update in ordered:
                mean += update.adapters.tensors[name].double() * (update.examples / total)
            averaged[name] = mean.to(before.dtype)
        return state, adapters.with_tensors(averaged)
