"""FedAdam (2003.00295): Adam at the server.

Rule, entry by entry, in round t = 1, 2, ...:
    D = sum_i w_i (theta_i - theta)
    m <- beta_1 m + (1 - beta_1) D
    v <- beta_2 v + (1 - beta_2) D^2
    eta_t = eta * sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1))
    theta <- theta + eta_t * m / (sqrt(v) + tau)

Needs: equal ranks.
Costs: FedAvg's traffic; two moments at the server.
The paper does not correct the bias (eta_t = eta) and starts v at tau^2 or more; Adam's paper (1412.6980) has t for
t + 1. Rule, numbers, option names and defaults equal those of Flower's FedAdam. Beyond Flower, the state is saved and
resumed with the run, the order of the clients' answers changes no bit, and an answer with NaN is refused before a
moment is spoilt.
"""

from __future__ import annotations

import math

from torch import Tensor

from strategies.server_optimiser import Adaptive


class FedAdam(Adaptive):
    """Makes a step of Adam on the clients' mean change.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[0, 0]], B=[[0]])
        >>> client = lora(A=[[1, 0]], B=[[0]])
        >>> A, _ = one_round(FedAdam(eta=1.0), start, [client]).factors("layer")
        >>> [round(entry, 3) for entry in A[0].tolist()]
        [0.735, 0.0]
    """

    def __init__(
        self,
        eta: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        """Sets the optimiser's options.

        Args:
            eta: Step size of the server.
            beta_1: Share of m that stays each round.
            beta_2: Share of v that stays each round.
            tau: Term added to sqrt(v); the smaller, the more adaptive.
        """
        super().__init__(eta, beta_1, beta_2, tau)

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Returns the running mean of the squares."""
        return self.beta_2 * v + (1 - self.beta_2) * squared

    def rate(self, round: int) -> float:
        """Returns eta_t: the step size, corrected for the bias of the first rounds."""
        # Both moments start at zero, and are too small by these factors at first.
        correction_v = math.sqrt(1 - self.beta_2 ** (round + 1))
        correction_m = 1 - self.beta_1 ** (round + 1)
        return self.eta * correction_v / correction_m
