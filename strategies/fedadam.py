"""FedAdam (2003.00295): Adam at the server.

Rule: D = sum_i w_i (theta_i - theta); m <- beta_1 m + (1 - beta_1) D; v <- beta_2 v + (1 - beta_2) D^2;
theta <- theta + eta_t * m / (sqrt(v) + tau), entry by entry, with
eta_t = eta * sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1)) in round t = 1, 2, ...
Needs: equal ranks. Costs: FedAvg's traffic; two moments at the server. The paper has no correction of the bias
(eta_t = eta) and lets v begin at tau^2 or more; Adam's own (1412.6980) has t for t + 1. The above is the arithmetic
of Flower's class of this name, whose numbers, option names and defaults these are. This one is here because its
state is saved and resumed with the run, the order in which clients answer changes no bit, and no client's NaN gets
into a moment for good: such an answer is refused before.
"""

from __future__ import annotations

import math

from torch import Tensor

from strategies.server_optimiser import Adaptive


class FedAdam(Adaptive):
    """The server's Adam on the clients' mean change."""

    def __init__(self, eta: float = 0.1, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3) -> None:
        """Sets the optimiser.

        Args:
            eta: The server's step size.
            beta_1: How much of m stays each round.
            beta_2: How much of v stays each round.
            tau: What is added to the root of v: the less, the more adaptive.
        """
        super().__init__(eta, beta_1, beta_2, tau)

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """The running mean of the squares."""
        return self.beta_2 * v + (1 - self.beta_2) * squared

    def rate(self, round: int) -> float:
        """The step size with the bias of the first rounds corrected, as Flower does it."""
        return self.eta * math.sqrt(1 - self.beta_2 ** (round + 1)) / (1 - self.beta_1 ** (round + 1))
