"""Two factors in place of a tensor: exact at the rank, and better from step to step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsplit.wire.codecs import Role, make_codec
from fedsplit.wire.low_rank import LowRank
from fedsplit.wire.packets import StepKey


def role_of(step: int, kind: str = "activation") -> Role:
    return Role(kind, "up", StepKey(1, 0, step))  # type: ignore[arg-type]


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through(codec: LowRank, tensor: Tensor, role: Role) -> Tensor:
    return codec.decode(codec.encode(tensor, role), role)


def test_a_matrix_of_the_rank_arrives_as_it_is() -> None:
    tensor = (matrix(12, 3) @ matrix(3, 20, seed=1)).view(2, 6, 20)
    assert torch.allclose(through(LowRank(3), tensor, role_of(0)), tensor, atol=1e-4)
    assert torch.allclose(through(LowRank(64), matrix(2, 5, 8), role_of(0)), matrix(2, 5, 8), atol=1e-3)


def test_the_factor_of_the_last_step_brings_the_error_near_the_least_possible() -> None:
    tensor = matrix(40, 30)
    values = torch.linalg.svdvals(tensor)
    least = float(values[4:].norm())
    warm, cold = LowRank(4), LowRank(4, remembers=False)
    errors = [float((through(warm, tensor, role_of(step)) - tensor).norm()) for step in range(30)]
    assert errors[0] > 1.05 * least and errors[-1] < 1.005 * least
    assert float((through(cold, tensor, role_of(29)) - tensor).norm()) == pytest.approx(errors[0], rel=1e-6)
    assert not cold.state()


def test_what_a_gradient_loses_is_added_to_the_next_one() -> None:
    sender = LowRank(2, make_codec("int8"))
    gradients = matrix(30, 6, 10)
    total = torch.zeros(6, 10)
    for step, gradient in enumerate(gradients):
        total += through(sender, gradient, role_of(step, "gradient"))
    residual = sender.state()[0]["gradient/up/0/0"][2:]
    assert torch.allclose(gradients.sum(0) - total, residual, atol=1e-3)


def test_the_last_batch_of_an_epoch_may_have_fewer_rows() -> None:
    codec = LowRank(4)
    for step, rows in enumerate((6, 2, 6)):
        tensor = matrix(rows, 10, seed=step)
        assert through(codec, tensor, role_of(step, "gradient")).shape == tensor.shape
    assert codec.state()[0]["gradient/up/0/0"].shape == (4 + 6, 10)
