"""The mean change as a step of the server: against loops, and what options may be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, start

from strategies.fedavg import FedAvg
from strategies.server_optimiser import Adaptive, add_step, check_options, mean_step, zeros


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), weights=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_adding_the_mean_step_is_fedavg(seed, weights) -> None:
    run = Round.begin(FedAvg(), start(seed=seed))
    updates, before = run.train([2] * len(weights), weights, seed=seed), run.adapters
    result = add_step(before, mean_step(before, updates))
    for name, tensor in run.aggregate(updates).tensors.items():
        torch.testing.assert_close(result.tensors[name], tensor, rtol=1e-6, atol=1e-7)


def test_the_step_is_weighted_float64_and_of_what_the_updates_hold() -> None:
    run = Round.begin(FedAvg(), start())
    updates = run.train([2, 2], [1, 3])
    only = [type(u)(u.client, u.adapters.only(frozenset("B")), u.examples, weight=u.weight) for u in updates]
    step = mean_step(run.adapters, only)
    assert step.keys() == {name for name in run.adapters.tensors if "lora_B" in name}
    for name, tensor in step.items():
        one, other = (update.adapters.tensors[name].double() for update in updates)
        torch.testing.assert_close(tensor, (one + 3 * other) / 4)  # B began at zero
    result = add_step(run.adapters, step)
    assert result.tensors.keys() == run.adapters.tensors.keys()


def test_zeros_have_the_shapes_of_the_adapters_under_every_prefix() -> None:
    adapters = start()
    state = zeros(adapters, "m", "v")
    assert {name: tensor.shape for name, tensor in state.items()} == {
        f"{prefix}.{name}": tensor.shape for prefix in "mv" for name, tensor in adapters.tensors.items()
    }
    assert {tensor.dtype for tensor in state.values()} == {torch.float64}


def test_what_tells_the_optimisers_apart_has_no_default() -> None:
    run = Round.begin(Adaptive(1.0, 0.0, 0.0, 1.0), start())
    with pytest.raises(NotImplementedError):
        run.aggregate(run.train([2]))


@pytest.mark.parametrize(
    "options", [{"eta": 0}, {"tau": -1.0}, {"eta": float("nan")}, {"beta_1": 1.0}, {"server_momentum": -0.1}]
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        check_options(**options)
    check_options(eta=1e-9, beta_1=0.0, beta_2=0.999, server_momentum=0.9)
