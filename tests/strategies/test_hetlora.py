"""HetLoRA by hand: weights by norm, zero-padding, and self-pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import SHAPES, Round, by_hand, start

from fedsplit.federation.strategy import broadcast
from fedsplit.updates import Adapters, ClientInfo, ClientUpdate, Layer, Task
from strategies.hetlora import HetLoRA, sure_rank, tail_norm


def test_a_client_weighs_as_much_as_its_change() -> None:
    """The norms are 3 s and 1 s, so p = (3/4, 1/4), whatever the examples: A = [3/4, 1/4], B = [9/4, 1/4]."""
    pairs = [([[1.0, 0.0]], [[3.0], [0.0]]), ([[0.0, 1.0]], [[0.0], [1.0]])]
    result = by_hand(HetLoRA(), pairs, [1, 100], alpha=5.0)
    assert result.tensors["l.lora_A.weight"].tolist() == [[0.75, 0.25]]
    assert result.tensors["l.lora_B.weight"].tolist() == [[2.25], [0.25]]


def test_padding_and_norms_know_the_scaling_of_each_rank() -> None:
    """alpha 2: s is 2 at rank 1 and 1 at rank 2. The norms are 2 * 1 and 1 * 6, so p = (1/4, 3/4).

    The first client's B is doubled when it is filled: A = [[1, 0], [0, 0]] / 4 + [[1, 0], [0, 1]] * 3/4,
    B = [[2, 0], [0, 0]] / 4 + [[0, 0], [0, 6]] * 3/4.
    """
    pairs = [([[1.0, 0.0]], [[1.0], [0.0]]), ([[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 6.0]])]
    before = ([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
    result = by_hand(HetLoRA(), pairs, [1, 1], alpha=2.0, before=before)
    assert result.tensors["l.lora_A.weight"].tolist() == [[1.0, 0.0], [0.0, 0.75]]
    assert result.tensors["l.lora_B.weight"].tolist() == [[0.5, 0.0], [0.0, 4.5]]


def test_the_norm_is_over_all_layers_of_a_client() -> None:
    """sqrt(3^2 + 4^2) = 5 = sqrt(0 + 5^2), so both clients weigh 1/2 in both layers (by sums it would be 7 and 5)."""
    layers = {"k": Layer(1.0, False), "l": Layer(1.0, True)}

    def update(client: int, k: float, l: float) -> ClientUpdate:  # noqa: E741
        tensors = {}
        for layer, value in (("k", k), ("l", l)):
            tensors[f"{layer}.lora_A.weight"] = torch.ones(1, 1)
            tensors[f"{layer}.lora_B.weight"] = torch.tensor([[value]])
        return ClientUpdate(client, Adapters(tensors, layers), 1)

    updates = [update(0, 3.0, 4.0), update(1, 0.0, 5.0)]
    _, result = HetLoRA().aggregate({}, updates[0].adapters, updates)
    assert result.tensors["k.lora_B.weight"].item() == 1.5
    assert result.tensors["l.lora_B.weight"].item() == 4.5


def test_where_no_client_has_moved_the_usual_shares_count() -> None:
    """B = 0 everywhere: A = (1 * [4, 0] + 3 * [0, 4]) / 4."""
    pairs = [([[4.0, 0.0]], [[0.0], [0.0]]), ([[0.0, 4.0]], [[0.0], [0.0]])]
    result = by_hand(HetLoRA(), pairs, [1, 3], alpha=2.0)
    assert result.tensors["l.lora_A.weight"].tolist() == [[1.0, 3.0]]


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    alpha=st.floats(0.5, 20),
    drift=st.floats(0.1, 3),
    seed=st.integers(0, 1000),
)
def test_the_rule_computed_the_plain_way(ranks: list[int], alpha: float, drift: float, seed: int) -> None:
    run = Round.begin(HetLoRA(), start(rank=4, alpha=alpha))
    for number in range(2):
        updates = run.train(ranks, drift=drift, seed=seed + number)
        before, result = run.adapters, run.aggregate(updates)
        norms = [
            sum(
                float(torch.linalg.matrix_norm(alpha / rank * (b.double() @ a.double()))) ** 2
                for a, b in (update.adapters.factors(layer) for layer in SHAPES)
            )
            ** 0.5
            for update, rank in zip(updates, ranks, strict=True)
        ]
        for layer, (out, width, _) in SHAPES.items():
            a, b = torch.zeros(4, width, dtype=torch.float64), torch.zeros(out, 4, dtype=torch.float64)
            a[max(ranks) :] = before.factors(layer)[0][max(ranks) :]
            for update, rank, norm in zip(updates, ranks, norms, strict=True):
                down, up = update.adapters.factors(layer)
                a[:rank] += norm / sum(norms) * down
                b[:, :rank] += norm / sum(norms) * up * (4 / rank)
            assert torch.allclose(result.factors(layer)[0].double(), a, rtol=1e-5, atol=1e-6)
            assert torch.allclose(result.factors(layer)[1].double(), b, rtol=1e-5, atol=1e-6)


def test_the_tail_is_what_lies_beyond_the_sure_share() -> None:
    """Rank 3, gamma 0.7: floor(2.1) = 2 rows are sure, so the tail is the third: |[3, 4]| * |[0, 2]| = 10."""
    tensors = {
        "l.lora_A.weight": torch.tensor([[9.0, 9.0], [9.0, 9.0], [3.0, 4.0]]),
        "l.lora_B.weight": torch.tensor([[7.0, 7.0, 0.0], [7.0, 7.0, 2.0]]),
    }
    assert tail_norm(Adapters(tensors, {"l": Layer(1.0, False)}), 0.7) == 10.0
    assert [sure_rank(rank, 0.99) for rank in (1, 2, 8, 100)] == [1, 1, 7, 99]
    assert sure_rank(100, 0.29) == 29 and math.floor(100 * 0.29) == 28
    assert sure_rank(7, 1.0) == 7


def with_tail(update: ClientUpdate, factor: float, gamma: float) -> ClientUpdate:
    """The update with its tail that of what it was given, times a number."""
    assert update.given is not None
    factors = {}
    for layer in update.adapters.complete:
        (a, b), (old, _) = update.adapters.factors(layer), update.given.factors(layer)
        sure = sure_rank(a.shape[0], gamma)
        factors[layer] = torch.cat([a[:sure], old[sure:] * factor]), b
        factors[layer][1][:, sure:] = update.given.factors(layer)[1][:, sure:]
    return replace(update, adapters=update.adapters.with_factors(factors))


def begun(**options: float) -> Round:
    """A run at rank 4 after a round, so that B is no longer zero."""
    run = Round.begin(HetLoRA(**options), start(rank=4))
    run.aggregate(run.train([4, 4, 4]))
    return run


def ranks_in(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: int(value) for name, value in state.items()}


def test_in_the_first_round_nobody_is_pruned() -> None:
    """B starts at zero, and so do the tails: none can become smaller."""
    assert ranks_in(begun(gamma=0.5, decay=0.1).state) == {}


def test_a_client_whose_tail_has_shrunk_goes_on_with_a_smaller_rank() -> None:
    run = begun(gamma=0.5, decay=0.1)
    for expected in ({"rank.1": 2}, {"rank.1": 1}, {"rank.1": 1}):
        updates = [
            with_tail(update, 0.5 if update.client == 1 else 1.0, 0.5) for update in run.train([4, 4, 4], seed=1)
        ]
        run.aggregate(updates)
        assert ranks_in(run.state) == expected
    for client, assigned, rank in ((0, 4, 4), (1, 4, 1), (2, 3, 3)):
        given = broadcast(run.strategy, run.state, run.adapters, ClientInfo(client, assigned))
        assert given is not None and {given.adapters.rank(layer) for layer in SHAPES} == {rank}


def test_a_rank_that_was_assigned_smaller_counts() -> None:
    run = begun(gamma=0.75, decay=0.1)
    state = {"rank.0": torch.tensor(3)}
    given = broadcast(run.strategy, state, run.adapters, ClientInfo(0, 2))
    assert given is not None and given.adapters.rank("linear") == 2


def test_an_absent_client_stays_pruned() -> None:
    run = begun(gamma=0.5, decay=0.1)
    run.state = {"rank.7": torch.tensor(2)}
    run.aggregate(run.train([4, 4]))
    assert ranks_in(run.state)["rank.7"] == 2


def test_a_pruned_tail_is_left_out_of_the_average() -> None:
    """As if the client had cut it off before sending."""
    run = begun(gamma=0.5, decay=0.1)
    updates = [with_tail(update, 0.5 if update.client == 0 else 1.0, 0.5) for update in run.train([4, 4])]
    cut = [replace(updates[0], adapters=updates[0].adapters.with_rank(2)), updates[1]]
    _, pruned = run.strategy.aggregate(run.state, run.adapters, updates)
    _, expected = HetLoRA().aggregate({}, run.adapters, cut)
    _, whole = HetLoRA().aggregate({}, run.adapters, updates)
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in pruned.tensors.items())
    assert not torch.equal(pruned.tensors["linear.lora_B.weight"], whole.tensors["linear.lora_B.weight"])


def test_without_a_penalty_nothing_is_pruned() -> None:
    run = begun(gamma=0.5)
    run.aggregate([with_tail(update, 0.5, 0.5) for update in run.train([4, 4, 4])])
    assert run.state == {}


@pytest.mark.parametrize(("decay", "task"), [(0.0, Task()), (0.25, Task(tail=0.5, decay=0.25))])
def test_clients_are_told_of_the_penalty(decay: float, task: Task) -> None:
    given = broadcast(HetLoRA(gamma=0.5, decay=decay), {}, start(rank=4), ClientInfo(0, 4))
    assert given is not None and given.task == task


@pytest.mark.parametrize(
    ("options", "what"),
    [({"gamma": 0.0}, "gamma"), ({"gamma": 1.5}, "gamma"), ({"decay": -1.0}, "decay"), ({"decay": math.nan}, "decay")],
)
def test_impossible_options_are_refused(options: dict[str, float], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        HetLoRA(**options)
