"""Terms of strategies against their formulas."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fedsplit.optimization.terms import terms_of
from fedsplit.stages import Gradients, GradientStage, LocalStep, RoundStart, Stages
from fedsplit.updates import Task

A, B = "l.lora_A.weight", "l.lora_B.weight"
START = {A: torch.tensor([[1.0, 2.0], [3.0, 4.0]]), B: torch.tensor([[1.0, 0.0], [0.0, 2.0]])}
ZERO = {name: torch.zeros(2, 2) for name in START}


def begun(task: Task, control: Mapping[str, Tensor] | None = None, own: GradientStage | None = None) -> Stages:
    terms = terms_of(task, control, own=own)
    terms.begin(RoundStart(START))
    return terms


def corrected(terms: Stages, gradients: Gradients, parameters: Mapping[str, Tensor] = START) -> Gradients:
    return terms(gradients, LocalStep(parameters))


def test_no_task_changes_nothing() -> None:
    terms = begun(Task())
    gradients = {A: torch.ones(2, 2)}
    assert corrected(terms, gradients)[A] is gradients[A]
    outcome = terms.end(START)
    assert outcome.sent == outcome.kept == {}


def test_the_proximal_term_pulls_back_to_the_start() -> None:
    """mu (theta - theta_t) = 0.5 * 2."""
    moved = {name: tensor + 2 for name, tensor in START.items()}
    found = corrected(begun(Task(proximal=0.5)), ZERO, moved)
    assert all(torch.equal(found[name], torch.ones(2, 2)) for name in START)


def test_the_start_is_remembered_even_where_the_parameters_are_the_same_tensors() -> None:
    parameters = {name: tensor.clone() for name, tensor in START.items()}
    terms = terms_of(Task(proximal=1.0))
    terms.begin(RoundStart(parameters))
    for tensor in parameters.values():
        tensor += 3
    assert all(torch.equal(corrected(terms, ZERO, parameters)[name], torch.full((2, 2), 3.0)) for name in START)


def test_control_variates_correct_and_become_the_mean_gradient() -> None:
    """g - c_i + c = 1 - 3 + 10, then 5 - 3 + 10; c_i+ = (1 + 5) / 2 = 3, which is what it was."""
    terms = begun(Task(control={A: torch.full((2, 2), 10.0)}), {A: torch.full((2, 2), 3.0)})
    seen = [float(corrected(terms, {A: torch.full((2, 2), g)})[A][0, 0]) for g in (1.0, 5.0)]
    assert seen == [8.0, 12.0]
    assert torch.equal(terms.end(START).sent[A], torch.zeros(2, 2))


def test_under_sgd_the_mean_gradient_is_the_papers_control_variate() -> None:
    """c_i+ = c_i - c + (theta_t - theta_i) / (K eta), 1910.06378 (option II)."""
    torch.manual_seed(0)
    c, own, rate, steps = torch.randn(2, 2), torch.randn(2, 2), 0.3, 4
    terms = begun(Task(control={A: c}), {A: own})
    theta = START[A].clone()
    for _ in range(steps):
        theta = theta - rate * corrected(terms, {A: torch.randn(2, 2)}, {A: theta})[A]
    paper = own - c + (START[A] - theta) / (steps * rate)
    assert torch.allclose(own + terms.end({A: theta}).sent[A], paper, atol=1e-5)


@pytest.mark.parametrize("decay", [0.25])
def test_the_pull_on_tails_is_the_gradient_of_their_norms(decay: float) -> None:
    """Of a rank of 2 the first stays: tails are A's second row and B's second column."""
    terms = begun(Task(tail=0.5, decay=decay))
    a, b = (START[name].clone().requires_grad_() for name in (A, B))
    (decay * a[1:].norm() * b[:, 1:].norm()).backward()
    found = corrected(terms, ZERO)
    assert torch.allclose(found[A], a.grad) and torch.allclose(found[B], b.grad)
    nothing = {A: START[A], B: torch.zeros(2, 2)}  # a norm of zero has no gradient
    assert all(torch.equal(corrected(terms, ZERO, nothing)[name], ZERO[name]) for name in START)


def test_control_variates_see_raw_gradients_and_the_strategys_own_stage_comes_last() -> None:
    """Proximal adds 1, the own stage doubles: 2 (g - 0 + 0 + 1); the control variate is the mean of g alone."""

    class Double(GradientStage):
        def __call__(self, gradients, step):
            return {name: gradient * 2 for name, gradient in gradients.items()}

    terms = begun(Task(control={}, proximal=0.5), own=Double())
    moved = {name: tensor + 2 for name, tensor in START.items()}
    found = corrected(terms, {A: torch.full((2, 2), 5.0)}, moved)
    assert torch.equal(found[A], torch.full((2, 2), 12.0))
    assert torch.equal(terms.end(moved).sent[A], torch.full((2, 2), 5.0))
