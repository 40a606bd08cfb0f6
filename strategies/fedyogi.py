"""FedYogi (2003.00295): Yogi at the server.

Rule, entry by entry:
    D = sum_i w_i (theta_i - theta)
    m <- beta_1 m + (1 - beta_1) D
    v <- v - (1 - beta_2) D^2 sign(v - D^2)
    theta <- theta + eta * m / (sqrt(v) + tau)

Needs: equal ranks.
Costs: FedAvg's traffic; two moments at the server.
The paper starts v at tau^2 or more. In this file v starts at zero: numbers, option names and defaults equal those of
Flower's FedYogi. Beyond Flower, the state is saved and resumed with the run, the order of the clients' answers changes
no bit, and an answer with NaN is refused before a moment is spoilt.
"""

from __future__ import annotations

from torch import Tensor

from strategies.server_optimiser import Adaptive


class FedYogi(Adaptive):
    """Makes a step of Yogi on the clients' mean change.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[0, 0]], B=[[0]])
        >>> client = lora(A=[[2, 0]], B=[[0]])
        >>> A, _ = one_round(FedYogi(eta=1.0, beta_1=0.5, beta_2=0.75, tau=1.0), start, [client]).factors("layer")
        >>> A.tolist()  # m = 0.5 * 2 and v = 0.25 * 4, so 1 / (1 + 1)
        [[0.5, 0.0]]
    """

    def __init__(
        self,
        eta: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        """Sets the optimiser's options.

        Args:
            eta: Step size of the server.
            beta_1: Share of m that stays each round.
            beta_2: Inertia of v: the closer to 1, the more slowly v follows the squares.
            tau: Term added to sqrt(v); the smaller, the more adaptive.
        """
        super().__init__(eta, beta_1, beta_2, tau)

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Returns v, moved towards D^2 by a share of D^2, however far apart the two are."""
        direction = (v - squared).sign()
        return v - (1 - self.beta_2) * squared * direction
