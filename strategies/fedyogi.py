"""FedYogi (2003.00295): Yogi at the server.

Rule: D = sum_i w_i (theta_i - theta); m <- beta_1 m + (1 - beta_1) D;
v <- v - (1 - beta_2) D^2 sign(v - D^2); theta <- theta + eta * m / (sqrt(v) + tau), entry by entry.
Needs: equal ranks. Costs: FedAvg's traffic; two moments at the server. The paper lets v begin at tau^2 or more; here
it is zero, as in Flower's class of this name, whose numbers, option names and defaults these are. This one is here
because its state is saved and resumed with the run, the order in which clients answer changes no bit, and no client's
NaN gets into a moment for good: such an answer is refused before.
"""

from __future__ import annotations

from torch import Tensor

from strategies.server_optimiser import Adaptive


class FedYogi(Adaptive):
    """The server's Yogi on the clients' mean change."""

    def __init__(self, eta: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3) -> None:
        """Sets the optimiser.

        Args:
            eta: The server's step size.
            beta_1: How much of m stays each round.
            beta_2: How slowly v follows the squares.
            tau: What is added to the root of v: the less, the more adaptive.
        """
        super().__init__(eta, beta_1, beta_2, tau)

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Moves by a part of D^2 towards it, however far away it is."""
        return v - (1 - self.beta_2) * squared * (v - squared).sign()
