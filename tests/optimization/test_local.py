"""Corrections of gradients against their formulas."""

from __future__ import annotations

import pytest
import torch

from fedsplit.optimization.local import LocalRule
from fedsplit.updates import Task

A, B = "l.lora_A.weight", "l.lora_B.weight"
START = {A: torch.tensor([[1.0, 2.0], [3.0, 4.0]]), B: torch.tensor([[1.0, 0.0], [0.0, 2.0]])}
ZERO = {name: torch.zeros(2, 2) for name in START}


def test_no_task_changes_nothing() -> None:
    rule = LocalRule(Task(), START, {})
    gradients = {A: torch.ones(2, 2)}
    assert rule.correct(gradients, START)[A] is gradients[A]
    assert rule.control_change() == {}


def test_which_factors_train() -> None:
    rule = LocalRule(Task(trains=frozenset("B")), START, {})
    assert [rule.trains(name) for name in (A, B, "l.lora_magnitude_vector.weight")] == [False, True, True]


def test_the_proximal_term_pulls_back_to_the_start() -> None:
    """mu (theta - theta_t) = 0.5 * 2."""
    rule = LocalRule(Task(proximal=0.5), START, {})
    moved = {name: tensor + 2 for name, tensor in START.items()}
    corrected = rule.correct(ZERO, moved)
    assert all(torch.equal(corrected[name], torch.ones(2, 2)) for name in START)


def test_control_variates_correct_and_become_the_mean_gradient() -> None:
    """g - c_i + c = 1 - 3 + 10, then 5 - 3 + 10; c_i+ = (1 + 5) / 2 = 3, which is what it was."""
    rule = LocalRule(Task(control={A: torch.full((2, 2), 10.0)}), START, {A: torch.full((2, 2), 3.0)})
    seen = [float(rule.correct({A: torch.full((2, 2), g)}, START)[A][0, 0]) for g in (1.0, 5.0)]
    assert seen == [8.0, 12.0]
    assert torch.equal(rule.control_change()[A], torch.zeros(2, 2))


def test_under_sgd_the_mean_gradient_is_the_papers_control_variate() -> None:
    """c_i+ = c_i - c + (theta_t - theta_i) / (K eta), 1910.06378 (option II)."""
    torch.manual_seed(0)
    c, own, rate, steps = torch.randn(2, 2), torch.randn(2, 2), 0.3, 4
    rule = LocalRule(Task(control={A: c}), START, {A: own})
    theta = START[A].clone()
    for _ in range(steps):
        theta = theta - rate * rule.correct({A: torch.randn(2, 2)}, {A: theta})[A]
    paper = own - c + (START[A] - theta) / (steps * rate)
    assert torch.allclose(own + rule.control_change()[A], paper, atol=1e-5)


@pytest.mark.parametrize("decay", [0.25])
def test_the_pull_on_tails_is_the_gradient_of_their_norms(decay: float) -> None:
    """Of a rank of 2 the first stays: tails are A's second row and B's second column."""
    rule = LocalRule(Task(tail=0.5, decay=decay), START, {})
    a, b = (START[name].clone().requires_grad_() for name in (A, B))
    (decay * a[1:].norm() * b[:, 1:].norm()).backward()
    corrected = rule.correct(ZERO, START)
    assert torch.allclose(corrected[A], a.grad) and torch.allclose(corrected[B], b.grad)
    nothing = {A: START[A], B: torch.zeros(2, 2)}  # a norm of zero has no gradient
    assert all(torch.equal(rule.correct(ZERO, nothing)[name], ZERO[name]) for name in START)
