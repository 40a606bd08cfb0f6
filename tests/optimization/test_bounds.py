"""How large values may be: what passes is finite when it is squared, and summed with that of others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.optimization.bounds import LARGEST_NORM, LARGEST_SHARE, is_bounded, norm
from fedsplit.optimization.optim import make_optimizer
from fedsplit.settings.sections import TrainSettings


@given(st.lists(st.floats(width=32), min_size=1, max_size=9))
def test_what_is_bounded_is_finite_and_so_is_the_sum_of_its_squares(values: list[float]) -> None:
    tensors = [torch.tensor(values), torch.zeros(2, 3)]
    squares = math.fsum(value**2 for value in values) if all(map(math.isfinite, values)) else math.inf
    if squares < LARGEST_NORM**2 * 0.99:
        assert is_bounded(*tensors) and norm(tensors) == pytest.approx(math.sqrt(squares), rel=1e-3, abs=1e-18)
    elif not squares < LARGEST_NORM**2 * 1.01:
        assert not is_bounded(*tensors)


def test_nothing_is_bounded_and_all_types_are_looked_at() -> None:
    assert norm([]) == 0.0 and is_bounded(torch.zeros(0))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert is_bounded(torch.full((9, 9), 6e4, dtype=dtype))
        assert not is_bounded(torch.tensor([1.0, math.nan], dtype=dtype))


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd", "momentum": 0.9}], ids=str)
def test_what_an_optimiser_remembers_of_the_largest_gradient_is_finite(settings: dict[str, object]) -> None:
    """Of the most that is taken from a client, and of the sum over as many clients as there is room for."""
    for largest in (LARGEST_SHARE, LARGEST_SHARE * 2**16 * 0.99):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = make_optimizer([parameter], TrainSettings(**settings))  # type: ignore[arg-type]
        assert optimizer is not None
        for _ in range(3):
            parameter.grad = torch.full((1,), largest)
            assert is_bounded(parameter.grad)
            optimizer.step()
        kept = [torch.as_tensor(value) for value in optimizer.state[parameter].values()]
        assert all(torch.isfinite(value).all() for value in [parameter.detach(), *kept])
