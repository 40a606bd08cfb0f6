"""The optimiser is AdamW with the settings given."""

from __future__ import annotations

import pytest
import torch

from fedsplit.config import TrainSettings
from fedsplit.optim import make_optimizer


def test_two_steps_by_hand() -> None:
    """AdamW's first step is lr * sign(gradient), after decay by lr * weight_decay; the second likewise here."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_optimizer([parameter], TrainSettings(lr=0.1, weight_decay=0.5))
    expected = torch.tensor([1.0, -2.0])
    for _ in range(2):
        parameter.grad = torch.tensor([3.0, -0.5])
        optimizer.step()
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([1.0, -1.0])
    assert parameter.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_nothing_to_train_needs_no_optimiser() -> None:
    assert make_optimizer([], TrainSettings()) is None
