"""FedYogi: two rounds by hand, and the numbers of Flower."""

from __future__ import annotations

import pytest
import torch
from flower_rounds import assert_equal_rounds, two_rounds
from flwr.serverapp.strategy import FedYogi as Flowers

from strategies.fedyogi import FedYogi

A = "l.lora_A.weight"


def test_two_rounds_by_hand() -> None:
    """beta_1 = 0.5, beta_2 = 0.75, tau = 1, eta = 2.

    D = 7: m = 3.5, v = 0 + 49 / 4, its root 3.5; A = 2 * 3.5 / 4.5 = 1.5556. Then D = 5.4444: m = 4.4722, and as
    D^2 = 29.64 is more than v, v = 12.25 + 29.64 / 4 = 19.6605; A = 1.5556 + 2 * 4.4722 / (4.434 + 1).
    """
    first = 7 / 4.5
    d = 7 - first
    second = first + 2 * (1.75 + d / 2) / ((12.25 + d**2 / 4) ** 0.5 + 1)
    got = two_rounds(FedYogi(eta=2.0, beta_1=0.5, beta_2=0.75, tau=1.0))
    assert got == pytest.approx([first, second], rel=1e-6)


def test_v_falls_by_a_part_of_the_square_and_not_of_itself() -> None:
    """v = 100 and D^2 = 4: Adam would take 0.75 * 100 + 0.25 * 4 = 76, Yogi takes 100 - 0.25 * 4 = 99."""
    v, squared = torch.tensor([100.0, 4.0, 1.0]), torch.tensor([4.0, 4.0, 9.0])
    assert FedYogi(beta_2=0.75).second_moment(v, squared).tolist() == [99.0, 4.0, 3.25]


@pytest.mark.parametrize("options", [{}, {"eta": 0.5, "tau": 0.1}, {"beta_1": 0.0, "beta_2": 0.5}, {"beta_2": 0.1}])
@pytest.mark.parametrize("seed", range(3))
def test_several_rounds_are_flowers(options, seed) -> None:
    assert_equal_rounds(FedYogi(**options), Flowers(fraction_train=0.0, **options), clients=4, seed=seed)
