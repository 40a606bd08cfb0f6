"""The coefficient is that of torch, wherever the parts of the gradient lie."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.optimization.clipping import Clip, coefficient, squared_norm
from fedsplit.stages import LocalStep, TrunkShare


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    cut=st.integers(0, 5),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    limit=st.floats(1e-3, 1e3),
)
def test_parts_of_a_gradient_are_scaled_as_the_whole(sizes: list[int], cut: int, scale: float, limit: float) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    gradients = [parameter.grad.clone() for parameter in parameters]
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    squared = squared_norm(gradients[:cut]) + squared_norm(gradients[cut:])
    assert math.sqrt(squared) == pytest.approx(float(norm), rel=1e-6)
    share = coefficient(squared, limit)
    assert 0 < share <= 1
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient * share, rtol=1e-6, atol=0)


def test_by_hand_and_at_the_ends() -> None:
    assert squared_norm([torch.tensor([[3.0]]), torch.tensor([4.0])]) == 25.0
    assert squared_norm([]) == 0.0
    assert coefficient(25.0, 1.0) == pytest.approx(1 / 5.000001, rel=1e-12)
    assert coefficient(25.0, 5.1) == 1.0 and coefficient(0.0, 1e-3) == 1.0
    assert math.isnan(coefficient(math.nan, 1.0)) and math.isnan(coefficient(math.inf, 1.0))
    assert squared_norm([torch.full((4,), 1e20)]) == pytest.approx(4e40)  # more than float32 holds


def test_the_stage_counts_the_trunks_norm_and_tells_it_the_coefficient() -> None:
    """A client's (3, 0) and the trunk's norm of 4 are 5 together."""
    told: list[float] = []
    gradient = torch.tensor([3.0, 0.0])
    step = LocalStep({"w": torch.zeros(2)}, TrunkShare(16.0, told.append))
    clipped = Clip(1.0)({"w": gradient}, step)["w"]
    assert clipped.tolist() == [pytest.approx(3 / 5), 0.0] and told == [coefficient(25.0, 1.0)]
    assert gradient.tolist() == [3.0, 0.0]


def test_the_stage_takes_a_client_alone_where_the_trunk_does_not_learn() -> None:
    clipped = Clip(1.5)({"w": torch.tensor([3.0, 0.0])}, LocalStep({"w": torch.zeros(2)}))["w"]
    assert clipped.tolist() == [pytest.approx(1.5), 0.0]
