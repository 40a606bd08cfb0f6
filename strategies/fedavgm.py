"""FedAvgM (1909.06335): FedAvg with momentum at the server.

Rule:
    D = sum_i w_i (theta_i - theta)
    m <- server_momentum * m + D
    theta <- theta + server_learning_rate * m

Needs: equal ranks.
Costs: FedAvg's traffic; one moment at the server. With the default options, which are Flower's, it is FedAvg.
The numbers are those of Flower's class of this name. Beyond Flower's: the momentum is saved and resumed with the run,
the order in which clients answer changes no bit, and an answer with NaN is refused before it can spoil the momentum.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.updates import Adapters, ClientUpdate, State, Traits
from strategies.server_optimiser import add_step, check_options, mean_step, zeros


class FedAvgM:
    """Makes a step of SGD with momentum on the clients' mean change.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[0, 0]], B=[[0]])
        >>> client = lora(A=[[2, 0]], B=[[0]])
        >>> A, _ = one_round(FedAvgM(server_learning_rate=0.5), start, [client]).factors("layer")
        >>> A.tolist()
        [[1.0, 0.0]]
    """

    traits = Traits(linear=True)

    def __init__(self, server_learning_rate: float = 1.0, server_momentum: float = 0.0) -> None:
        """Sets the optimiser's options.

        Args:
            server_learning_rate: Step size of the server.
            server_momentum: Share of the last step that is added to the next.
        """
        check_options(server_learning_rate=server_learning_rate, server_momentum=server_momentum)
        self.server_learning_rate = server_learning_rate
        self.server_momentum = server_momentum

    def init(self, adapters: Adapters) -> State:
        """Returns a momentum of zero."""
        return zeros(adapters, "m")

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Makes one step of the server's SGD.

        Raises:
            ValueError: No client trained on any example.
        """
        new_state = dict(state)  # a copy: a repeated round must begin with the same state
        step = {}
        for name, change in mean_step(adapters, updates).items():
            m = self.server_momentum * state[f"m.{name}"] + change
            step[name] = self.server_learning_rate * m
            new_state[f"m.{name}"] = m
        return new_state, add_step(adapters, step)
