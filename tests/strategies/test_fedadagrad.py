"""FedAdagrad: two rounds by hand, and the numbers of Flower."""

from __future__ import annotations

import pytest
from flower_rounds import assert_equal_rounds, two_rounds
from flwr.serverapp.strategy import FedAdagrad as Flowers

from strategies.fedadagrad import FedAdagrad

A = "l.lora_A.weight"


def test_two_rounds_by_hand() -> None:
    """D = 7, v = 49, A = 2 * 7 / (7 + 1) = 1.75; then D = 5.25, v = 49 + 5.25^2 and its root is 8.75.

    A = 1.75 + 2 * 5.25 / 9.75 = 2.826923...
    """
    assert two_rounds(FedAdagrad(eta=2.0, tau=1.0)) == pytest.approx([1.75, 1.75 + 10.5 / 9.75], rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"eta": 0.5, "tau": 0.1}])
@pytest.mark.parametrize("seed", range(3))
def test_several_rounds_are_flowers(options, seed) -> None:
    assert_equal_rounds(FedAdagrad(**options), Flowers(fraction_train=0.0, **options), clients=4, seed=seed)
