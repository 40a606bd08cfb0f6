"""Clipping before another strategy: by hand, at any rank, and whatever the other does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, by_hand, start

import strategies
from fedsplit.errors import SettingError
from fedsplit.federation.strategy import load_strategy, traits_of
from fedsplit.updates import Assignment, ClientInfo, Task, Traits, average_adapters, weighted
from strategies.fedavg import FedAvg
from strategies.krum import Krum
from strategies.normclip import NormClip, clipped
from strategies.scaffold import Scaffold


class Recording:
    """Keeps what it sees, shares A only and lets ranks differ."""

    traits = Traits(mixed_ranks=True, personal=frozenset("B"), linear=True)

    def __init__(self, seed: int = 0, colour: str = "red") -> None:
        self.seed, self.colour, self.seen = seed, colour, []

    def init(self, adapters):
        return {"rounds": torch.zeros(())}

    def broadcast(self, state, adapters, client):
        return None if client.client == 7 else Assignment(adapters.with_rank(client.rank), Task(proximal=0.5))

    def aggregate(self, state, adapters, updates):
        self.seen = list(updates)
        return {"rounds": state["rounds"] + 1}, adapters


@pytest.fixture
def recording(monkeypatch) -> None:
    monkeypatch.setitem(strategies.STRATEGIES, "recording", f"{__name__}:Recording")


def change_norm(update) -> float:
    before = update.given.tensors
    return math.sqrt(sum(float(((t.double() - before[n]) ** 2).sum()) for n, t in update.adapters.tensors.items()))


def test_a_change_that_is_too_long_is_scaled_by_hand() -> None:
    """From (1, 1): (4, 5) has the change (3, 4) of norm 5, scaled to 2.5: (2.5, 3); (1, 3) has the norm 2 and stays.

    With 1 and 3 examples A = (2.5 + 3 * 1) / 4 = 1.375, B = (3 + 3 * 3) / 4 = 3.
    """
    pairs = [([[4.0]], [[5.0]]), ([[1.0]], [[3.0]])]
    result = by_hand(NormClip(norm=2.5), pairs, [1, 3], alpha=3.0, before=([[1.0]], [[1.0]]))
    assert [tensor.item() for tensor in result.tensors.values()] == [1.375, 3.0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), norm=st.floats(0.01, 20.0), rank=st.sampled_from([2, 3, 4]))
def test_no_change_is_longer_than_the_norm_and_its_direction_stays(seed, norm, rank) -> None:
    run = Round.begin(Recording(), start(rank=4, seed=seed))
    for update in run.train([rank, 4], seed=seed):
        after = clipped(update, run.adapters, norm)
        length = change_norm(update)
        if length <= norm:
            assert after is update
            continue
        assert change_norm(after) == pytest.approx(norm, rel=1e-4)
        for name, tensor in after.adapters.tensors.items():
            before = update.given.tensors[name]
            expected = before + norm / length * (update.adapters.tensors[name] - before)
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_mixed_ranks_and_personal_factors_are_clipped_by_what_each_client_was_given(recording) -> None:
    strategy = NormClip(norm=0.5, around="recording")
    run = Round.begin(strategy, start(rank=4))
    updates = run.train([2, 4, 3])
    assert all(change_norm(update) > 0.5 for update in updates)
    run.aggregate(updates)
    assert [update.adapters.rank("linear") for update in strategy.inner.seen] == [2, 4, 3]
    for update in strategy.inner.seen:
        assert change_norm(update) == pytest.approx(0.5, rel=1e-5)
        assert not any("lora_B" in name for name in update.adapters.tensors)


def test_what_is_handed_on_does_not_depend_on_the_inner(recording) -> None:
    """The inner one's result is what it makes of updates that were clipped before."""
    run = Round.begin(FedAvg(), start())
    updates = run.train([2] * 5)
    before = [clipped(update, run.adapters, 1.0) for update in updates]
    _, mean = NormClip(norm=1.0).aggregate({}, run.adapters, updates)
    expected = average_adapters(run.adapters, *weighted(before))
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in mean.tensors.items())
    _, krum = NormClip(norm=1.0, around="krum", malicious=1).aggregate({}, run.adapters, updates)
    _, expected = Krum(malicious=1).aggregate({}, run.adapters, before)
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in krum.tensors.items())


def test_one_client_cannot_move_the_average_by_more_than_its_share_of_the_norm() -> None:
    run = Round.begin(NormClip(norm=1.0), start())
    updates, before = run.train([2] * 4, [1, 1, 1, 1]), run.adapters
    far = {n: t * 1e6 for n, t in updates[0].adapters.tensors.items()}
    results = [
        NormClip(norm=1.0).aggregate({}, before, [replace(updates[0], adapters=adapters), *updates[1:]])[1]
        for adapters in (before, before.with_tensors(far))
    ]
    apart = sum(float(((t - results[1].tensors[n]) ** 2).sum()) for n, t in results[0].tensors.items())
    assert apart**0.5 == pytest.approx(1.0 / 4, rel=1e-4)


def test_state_tasks_and_rests_are_the_inners(recording) -> None:
    strategy, adapters = NormClip(norm=1.0, around="recording"), start(rank=4)
    state = strategy.init(adapters)
    assert state.keys() == {"rounds"}
    assert strategy.broadcast(state, adapters, ClientInfo(7, 2)) is None
    assignment = strategy.broadcast(state, adapters, ClientInfo(1, 2))
    assert assignment.task.proximal == 0.5 and assignment.adapters.rank("linear") == 2
    plain = NormClip(norm=1.0).broadcast({}, adapters, ClientInfo(1, 4))
    assert all(torch.equal(tensor, adapters.tensors[name]) for name, tensor in plain.adapters.tensors.items())


def test_traits_are_the_inners_but_for_secure_sums(recording) -> None:
    """The server must see a single client's change to clip it."""
    assert traits_of(NormClip(norm=1.0, around="recording")) == replace(Recording.traits, linear=False)
    assert traits_of(FedAvg()).linear and not traits_of(NormClip(norm=1.0)).linear


def test_options_reach_the_inner_and_defaults_only_if_it_takes_them(recording) -> None:
    assert vars(NormClip(norm=1.0, around="recording", seed=5, clients=3, colour="blue").inner) == {
        "seed": 5,
        "colour": "blue",
        "seen": [],
    }
    assert NormClip(around="scaffold").inner.clients == Scaffold().clients
    loaded = load_strategy("normclip", {"norm": 1.0, "around": "scaffold", "eta": 0.5}, {"clients": 9, "seed": 1})
    assert isinstance(loaded.inner, Scaffold) and (loaded.inner.clients, loaded.inner.eta) == (9, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": 0.0}, "norm is 0.0"),
        ({"norm": float("nan")}, "norm is nan"),
        ({"norm": 1.0, "around": "normclip"}, "normclip around normclip"),
        ({"norm": 1.0, "around": "nothing"}, "there is no strategy 'nothing'; there are .*fedavg, "),
        ({"norm": 1.0, "colour": 1}, "fedavg does not take the option 'colour', but no option at all"),
        ({"norm": 1.0, "around": "fedprox", "nu": 1}, "fedprox does not take the option 'nu', but mu"),
    ],
)
def test_options_that_are_none_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        NormClip(**options)
    with pytest.raises(SettingError, match=message):
        load_strategy("normclip", options, {"clients": 2})
