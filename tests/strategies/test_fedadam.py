"""FedAdam: two rounds by hand, and the numbers of Flower."""

from __future__ import annotations

import pytest
from flower_rounds import assert_equal_rounds, two_rounds
from flwr.serverapp.strategy import FedAdam as Flowers

from strategies.fedadam import FedAdam

A = "l.lora_A.weight"


def test_two_rounds_by_hand() -> None:
    """beta_1 = 0.5, beta_2 = 0.75, tau = 1, eta = 2.

    D = 7: m = 3.5, v = 49 / 4, its root 3.5; rate = 2 * sqrt(1 - 0.75^2) / (1 - 0.5^2); A = rate * 3.5 / 4.5.
    Then D = 7 - A, and everything by the rule again with the third powers.
    """
    first = 2 * (1 - 0.5625) ** 0.5 / 0.75 * 3.5 / 4.5
    d = 7 - first
    m, v = 0.5 * 3.5 + 0.5 * d, 0.75 * 12.25 + 0.25 * d**2
    second = first + 2 * (1 - 0.75**3) ** 0.5 / (1 - 0.5**3) * m / (v**0.5 + 1)
    got = two_rounds(FedAdam(eta=2.0, beta_1=0.5, beta_2=0.75, tau=1.0))
    assert got == pytest.approx([first, second], rel=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"eta": 0.5, "tau": 0.1}, {"beta_1": 0.0, "beta_2": 0.5}, {"beta_1": 0.5, "beta_2": 0.999}]
)
@pytest.mark.parametrize("seed", range(3))
def test_several_rounds_are_flowers(options, seed) -> None:
    assert_equal_rounds(FedAdam(**options), Flowers(fraction_train=0.0, **options), clients=4, seed=seed)
