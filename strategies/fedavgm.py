"""FedAvgM (1909.06335): FedAvg with momentum at the server.

Rule: D = sum_i w_i (theta_i - theta); m <- server_momentum * m + D; theta <- theta + server_learning_rate * m.
Needs: equal ranks. Costs: FedAvg's traffic; one moment at the server. With the options' defaults, which are
Flower's, it is FedAvg.
The numbers are those of Flower's class of this name. This one is here because its momentum is saved and resumed
with the run, the order in which clients answer changes no bit, and no client's NaN gets into a moment for good: such
an answer is refused before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, Traits
from strategies.server_optimiser import check, mean_step, moved, zeros


class FedAvgM:
    """The server's SGD with momentum on the clients' mean change."""

    traits = Traits(linear=True)

    def __init__(self, server_learning_rate: float = 1.0, server_momentum: float = 0.0) -> None:
        """Sets the optimiser.

        Args:
            server_learning_rate: The server's step size.
            server_momentum: The share of the last step that is added to the next.
        """
        check(server_learning_rate=server_learning_rate, server_momentum=server_momentum)
        self.server_learning_rate, self.server_momentum = server_learning_rate, server_momentum

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """No momentum yet."""
        return zeros(adapters, "m")

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """One step of the server's SGD.

        Raises:
            ValueError: No client has any example.
        """
        change = mean_step(adapters, updates)
        moments = {name: self.server_momentum * state[f"m.{name}"] + by for name, by in change.items()}
        step = {name: self.server_learning_rate * m for name, m in moments.items()}
        return {**state, **{f"m.{name}": m for name, m in moments.items()}}, moved(adapters, step)
