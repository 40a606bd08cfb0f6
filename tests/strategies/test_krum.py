"""Krum and Multi-Krum: by hand, against loops, as Flower's, and under rotations of the factors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flower_rounds import flower_round
from flwr.serverapp.strategy import Krum as FlowersKrum
from flwr.serverapp.strategy import MultiKrum as FlowersMultiKrum
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, applied, by_hand, start
from test_distances import rotated

from strategies.fedavg import FedAvg
from strategies.krum import Krum, MultiKrum, scores

A, B = "l.lora_A.weight", "l.lora_B.weight"


def trained(count: int, seed: int):
    """A run in its second round, and what its clients return."""
    run = Round.begin(FedAvg(), start(seed=seed))
    run.aggregate(run.train([2] * 3, seed=seed))
    return run, run.train([2] * count, seed=seed)


def test_the_middle_one_is_chosen_by_hand() -> None:
    """A = 0, 1, 3, 20, 1.5 at B = 1, alpha = r = 1, f = 1: the sum of the 2 least squares.

    0: 1 + 2.25; 1: 0.25 + 1; 3: 2.25 + 4; 20: 289 + 342.25; 1.5: 0.25 + 2.25. The second has the least.
    """
    pairs = [([[a]], [[1.0]]) for a in (0.0, 1.0, 3.0, 20.0, 1.5)]
    result = by_hand(Krum(malicious=1), pairs, [1] * 5, alpha=1.0)
    assert result.tensors[A].item() == 1.0
    points = [update.adapters for update in trained(5, 0)[1]]
    hand = [
        replace(points[0], tensors={A: torch.tensor(a), B: torch.tensor(b)}, layers={"l": points[0].layers["linear"]})
        for a, b in pairs
    ]
    expected = torch.tensor([3.25, 1.25, 6.25, 631.25, 2.5], dtype=torch.float64)
    torch.testing.assert_close(scores(hand, 1, "factors"), expected)
    torch.testing.assert_close(scores(hand, 1, "product"), expected * 9.0)  # alpha = 3


def test_the_best_are_averaged_with_their_weights_by_hand() -> None:
    """As above the best two are A = 1 (2 examples) and A = 1.5 (6): (2 * 1 + 6 * 1.5) / 8 = 1.375."""
    pairs = [([[a]], [[1.0]]) for a in (0.0, 1.0, 3.0, 20.0, 1.5)]
    result = by_hand(MultiKrum(malicious=1, keep=2), pairs, [9, 2, 9, 9, 6], alpha=1.0)
    assert result.tensors[A].item() == 1.375
    """By default n - f = 4 are kept: (0 + 1 + 3 + 1.5) / 4."""
    assert by_hand(MultiKrum(malicious=1), pairs, [1] * 5, alpha=1.0).tensors[A].item() == 1.375


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), malicious=st.integers(0, 2), more=st.integers(0, 2))
def test_scores_are_those_of_the_dense_changes(seed, malicious, more) -> None:
    points = [update.adapters for update in trained(2 * malicious + 3 + more, seed)[1]]
    dense = [torch.cat([change.flatten() for change in applied(point).values()]) for point in points]
    expected = []
    for number, point in enumerate(dense):
        apart = sorted(float(((point - other) ** 2).sum()) for i, other in enumerate(dense) if i != number)
        expected.append(sum(apart[: len(points) - malicious - 2]))
    torch.testing.assert_close(
        scores(points, malicious, "product"), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("clients", "malicious", "keep"), [(5, 1, 3), (8, 2, 2), (7, 0, 7), (9, 3, 1)])
def test_on_factors_the_numbers_are_flowers(seed, clients, malicious, keep) -> None:
    run, updates = trained(clients, seed)
    common = {"fraction_train": 0.0, "num_malicious_nodes": malicious}
    for ours, theirs in (
        (Krum(malicious, on="factors"), FlowersKrum(**common)),
        (MultiKrum(malicious, keep, on="factors"), FlowersMultiKrum(num_nodes_to_select=keep, **common)),
    ):
        expected = flower_round(theirs, 1, run.adapters, updates)
        _, result = ours.aggregate({}, run.adapters, updates)
        for name, tensor in result.tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("on", ["product", "factors"])
def test_krum_returns_one_clients_adapters_to_the_bit_and_no_outlier(on) -> None:
    run, updates = trained(7, 3)
    for number in (1, 4):
        far = {n: t * 1e6 for n, t in updates[number].adapters.tensors.items()}
        updates[number] = replace(updates[number], adapters=run.adapters.with_tensors(far))
    _, result = Krum(2, on).aggregate({}, run.adapters, updates)
    equal = [all(torch.equal(t, u.adapters.tensors[n]) for n, t in result.tensors.items()) for u in updates]
    assert equal.count(True) == 1 and equal.index(True) not in (1, 4)
    _, several = MultiKrum(2, on=on).aggregate({}, run.adapters, updates)
    assert max(float(tensor.abs().max()) for tensor in several.tensors.values()) < 10


@pytest.mark.parametrize("seed", range(5))
def test_rotated_factors_change_the_choice_on_factors_only(seed) -> None:
    """Clients near each other, of whom the one in the middle rotates its factors."""
    run, _ = trained(3, seed)
    updates = run.train([2] * 5, drift=0.05, seed=seed)
    plain = {on: scores([update.adapters for update in updates], 1, on) for on in ("product", "factors")}
    turned = list(updates)
    for number in {int(plain[on].argmin()) for on in plain}:
        turned[number] = replace(updates[number], adapters=rotated(updates[number].adapters, seed))
    points = [update.adapters for update in turned]
    torch.testing.assert_close(scores(points, 1, "product"), plain["product"], rtol=1e-4, atol=1e-6)
    assert int(scores(points, 1, "product").argmin()) == int(plain["product"].argmin())
    assert int(scores(points, 1, "factors").argmin()) != int(plain["factors"].argmin())


def test_a_tie_goes_to_the_lower_number() -> None:
    pairs = [([[a]], [[1.0]]) for a in (3.0, 1.0, 3.0, 1.0)]
    assert by_hand(Krum(), pairs, [1] * 4, alpha=1.0).tensors[A].item() == 3.0


def test_too_few_clients_are_refused() -> None:
    run, updates = trained(4, 0)
    with pytest.raises(ValueError, match="4 clients answered, but Krum needs 5 with malicious = 1"):
        Krum(malicious=1).aggregate({}, run.adapters, updates)
    with pytest.raises(ValueError, match="4 clients answered, of whom Multi-Krum is to keep 5"):
        MultiKrum(keep=5).aggregate({}, run.adapters, updates)


@pytest.mark.parametrize("options", [{"malicious": -1}, {"keep": -1}, {"on": "cosine"}])
def test_options_that_are_none_are_refused(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MultiKrum(**options)
