"""SCAFFOLD: the server's step and its control variate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, by_hand, start

from fedsplit.updates import Adapters, ClientInfo, ClientUpdate, Layer
from strategies.fedavg import FedAvg
from strategies.scaffold import Scaffold

A, B = "l.lora_A.weight", "l.lora_B.weight"


def pair(a: float, b: float) -> dict[str, torch.Tensor]:
    return {A: torch.tensor([[a]]), B: torch.tensor([[b]])}


def test_theta_and_c_by_hand() -> None:
    """theta = (1, 2); clients of 1 and 3 examples at (3, 2) and (5, 6): mean change ((2 + 12) / 4, (0 + 12) / 4).

    With eta = 0.5: A = 1 + 3.5 / 2 = 2.75, B = 2 + 3 / 2 = 3.5. c = (4 + 8) / 6 = 2 and (-3 + 0) / 6 = -0.5
    with N = 6 though two answered; and after the same again, 4 and -1.
    """
    strategy = Scaffold(eta=0.5, clients=6)
    adapters = Adapters(pair(1.0, 2.0), {"l": Layer(3.0, False)})
    updates = [
        ClientUpdate(0, adapters.with_tensors(pair(3.0, 2.0)), 1, control=pair(4.0, -3.0)),
        ClientUpdate(4, adapters.with_tensors(pair(5.0, 6.0)), 3, control=pair(8.0, 0.0)),
    ]
    state, result = strategy.aggregate(strategy.init(adapters), adapters, updates)
    assert (result.tensors[A].item(), result.tensors[B].item()) == (2.75, 3.5)
    assert (state[f"c.{A}"].item(), state[f"c.{B}"].item()) == (2.0, -0.5)
    state, _ = strategy.aggregate(state, result, updates)
    assert (state[f"c.{A}"].item(), state[f"c.{B}"].item()) == (4.0, -1.0)
    task = strategy.broadcast(state, result, ClientInfo(1, 1)).task
    assert {name: tensor.item() for name, tensor in task.control.items()} == {A: 4.0, B: -1.0}
    assert {tensor.dtype for tensor in task.control.values()} == {torch.float32}


def test_with_a_server_step_of_one_theta_is_fedavgs() -> None:
    scaffold, plain = Round.begin(Scaffold(), start()), Round.begin(FedAvg(), start())
    for _ in range(3):
        updates = scaffold.train([2] * 4)
        one, other = scaffold.aggregate(updates), plain.aggregate(updates)
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-6, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 5), clients=st.integers(1, 5))
def test_with_sgd_the_mean_raw_gradient_is_the_papers_second_option(seed, steps, clients) -> None:
    """Clients of quadratic losses h_i / 2 (theta - t_i)^2 step by SGD; c as sent equals c by the paper's formula."""
    generator = torch.Generator().manual_seed(seed)
    adapters = start()
    strategy, eta = Scaffold(clients=clients), 0.1
    state = strategy.init(adapters)
    target = [{n: torch.randn(t.shape, generator=generator) for n, t in adapters.tensors.items()} for _ in range(5)]
    own = [{n: torch.zeros_like(t) for n, t in adapters.tensors.items()} for _ in range(clients)]
    by_paper = {n: torch.zeros_like(t).double() for n, t in adapters.tensors.items()}
    for _ in range(3):
        updates, paper = [], []
        for client in range(clients):
            control = strategy.broadcast(state, adapters, ClientInfo(client, 2)).task.control
            theta = dict(adapters.tensors)
            whole = {n: torch.zeros_like(t) for n, t in theta.items()}
            for _ in range(steps):
                gradient = {n: (client + 1) / 3 * (t - target[client][n]) for n, t in theta.items()}
                whole = {n: whole[n] + g for n, g in gradient.items()}
                theta = {n: t - eta * (gradient[n] - own[client][n] + control[n]) for n, t in theta.items()}
            plus = {n: g / steps for n, g in whole.items()}
            paper.append({n: (adapters.tensors[n] - theta[n]) / (steps * eta) - control[n] for n in theta})
            change = {n: plus[n] - own[client][n] for n in plus}
            updates.append(ClientUpdate(client, adapters.with_tensors(theta), client + 1, control=change))
            own[client] = plus
        state, adapters = strategy.aggregate(state, adapters, updates)
        for name in by_paper:
            by_paper[name] += sum(delta[name].double() for delta in paper) / clients
            torch.testing.assert_close(state[f"c.{name}"], by_paper[name], rtol=1e-4, atol=1e-4)


def test_a_client_that_returns_no_control_variate_is_named() -> None:
    with pytest.raises(ValueError, match="client 0 returned no control variate for"):
        by_hand(Scaffold(), [([[1.0]], [[1.0]])], [1], alpha=1.0, change=lambda update: replace(update, control={}))


@pytest.mark.parametrize("options", [{"eta": 0.0}, {"eta": float("nan")}, {"clients": -1}])
def test_options_that_are_none_are_refused(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Scaffold(**options)
