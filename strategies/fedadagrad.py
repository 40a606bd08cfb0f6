"""FedAdagrad (2003.00295): Adagrad at the server.

Rule: D = sum_i w_i (theta_i - theta); v <- v + D^2; theta <- theta + eta * D / (sqrt(v) + tau), entry by entry.
Needs: equal ranks. Costs: FedAvg's traffic; two moments at the server. The paper lets v begin at tau^2 or more and
has momentum; here both are zero, as in Flower's class of this name, whose numbers, option names and defaults these are.
This one is here because its state is saved and resumed with the run, the order in which clients answer changes no
bit, and no client's NaN gets into a moment for good: such an answer is refused before.
"""

from __future__ import annotations

from torch import Tensor

from strategies.server_optimiser import Adaptive


class FedAdagrad(Adaptive):
    """The server's Adagrad on the clients' mean change."""

    def __init__(self, eta: float = 0.1, tau: float = 1e-3) -> None:
        """Sets the optimiser.

        Args:
            eta: The server's step size.
            tau: What is added to the root of v: the less, the more adaptive.
        """
        super().__init__(eta, 0.0, 0.0, tau)

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """The sum of all squares."""
        return v + squared
