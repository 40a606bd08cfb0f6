"""FedAdagrad (2003.00295): Adagrad at the server.

Rule, entry by entry:
    D = sum_i w_i (theta_i - theta)
    v <- v + D^2
    theta <- theta + eta * D / (sqrt(v) + tau)

Needs: equal ranks.
Costs: FedAvg's traffic; two moments at the server.
The paper starts v at tau^2 or more and has momentum. In this file both start at zero: numbers, option names and
defaults equal those of Flower's FedAdagrad. Beyond Flower, the state is saved and resumed with the run, the order of
the clients' answers changes no bit, and an answer with NaN is refused before a moment is spoilt.
"""

from __future__ import annotations

from torch import Tensor

from strategies.server_optimiser import Adaptive


class FedAdagrad(Adaptive):
    """Makes a step of Adagrad on the clients' mean change.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[0, 0]], B=[[0]])
        >>> client = lora(A=[[3, 0]], B=[[0]])
        >>> A, _ = one_round(FedAdagrad(eta=1.0, tau=1.0), start, [client]).factors("layer")
        >>> A.tolist()  # 3 / (sqrt(9) + 1)
        [[0.75, 0.0]]
    """

    def __init__(self, eta: float = 0.1, tau: float = 1e-3) -> None:
        """Sets the optimiser's options.

        Args:
            eta: Step size of the server.
            tau: Term added to sqrt(v); the smaller, the more adaptive.
        """
        super().__init__(eta, 0.0, 0.0, tau)

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Returns the sum of all squares so far."""
        return v + squared
