"""FedBuff: who rests when, what a stale change counts, and that nothing is lost on the way."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, start
from safetensors.torch import load_file, save_file

from fedsplit.updates import Adapters, ClientInfo, ClientUpdate, Layer
from strategies.fedavg import FedAvg
from strategies.fedbuff import FedBuff

A = "l.lora_A.weight"


def single(value: float) -> Adapters:
    return Adapters({A: torch.tensor([[value]]), "l.lora_B.weight": torch.zeros(1, 1)}, {"l": Layer(3.0, False)})


class Clients:
    """Clients that add a number of their own to A in every round in which they are asked."""

    def __init__(self, strategy: FedBuff, adds: list[float], examples: list[int] | None = None) -> None:
        self.run, self.adds = Round.begin(strategy, single(0.0)), adds
        self.examples = examples or [1] * len(adds)

    def asked(self) -> list[int]:
        infos = [ClientInfo(client, 1) for client in range(len(self.adds))]
        return [i.client for i in infos if self.run.strategy.broadcast(self.run.state, self.run.adapters, i)]

    def round(self) -> float:
        updates = []
        for client in self.asked():
            given = self.run.strategy.broadcast(self.run.state, self.run.adapters, ClientInfo(client, 1)).adapters
            after = given.with_tensors({**given.tensors, A: given.tensors[A] + self.adds[client]})
            updates.append(ClientUpdate(client, after, self.examples[client], given=given))
        return self.run.aggregate(updates).tensors[A].item()


def test_a_stale_change_counts_less_by_hand() -> None:
    """Delays 1 and 3, examples 1 and 3, changes 8 and 16.

    Rounds 0 and 1: client 0 alone, +8 each. Round 2: client 0 (new) and client 1, asked two steps ago:
    (1 * 8 + 3 * 16 / sqrt(3)) / 4 = 2 + 12 / sqrt(3).
    """
    clients = Clients(FedBuff("1,3"), [8.0, 16.0], [1, 3])
    seen = []
    for resting in ([], [1], [1], []):
        assert clients.asked() == [client for client in (0, 1) if client not in resting]
        seen.append(clients.round())
    assert seen[:3] == pytest.approx([8.0, 16.0, 18.0 + 12.0 / 3**0.5], rel=1e-6)
    assert seen[3] == pytest.approx(seen[2] + 8.0, rel=1e-6)  # client 1 was asked again, and is under way


def test_the_change_is_from_what_the_client_was_given() -> None:
    """Client 1 started from 0 and returned 16; that theta has moved on by 8 since takes nothing away from the 16."""
    clients = Clients(FedBuff("1,2"), [8.0, 16.0])
    clients.round()
    assert clients.round() == pytest.approx(8.0 + (8.0 + 16.0 / 2**0.5) / 2, rel=1e-6)


def test_a_step_waits_for_as_many_as_the_buffer_holds() -> None:
    """K = 3 with two clients of delay 1: nothing after round 0, all four after round 1, of no staleness."""
    clients = Clients(FedBuff("1", buffer=3, eta=0.5), [2.0, 6.0])
    assert clients.round() == 0.0
    assert int(clients.run.state["version"]) == 0
    assert sum(name.startswith("facts.") for name in clients.run.state) == 2
    assert clients.round() == 0.5 * 4.0
    assert int(clients.run.state["version"]) == 1
    assert set(clients.run.state) == {"round", "version"}


def test_a_round_in_which_too_few_arrive_changes_no_bit() -> None:
    run = Round.begin(FedBuff("1", buffer=9), start())
    before = run.adapters
    result = run.aggregate(run.train([2] * 4))
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in result.tensors.items())
    assert not torch.equal(
        run.aggregate(run.train([2] * 5)).tensors["conv.lora_A.weight"], before.tensors["conv.lora_A.weight"]
    )


@pytest.mark.parametrize("known", [0, 2])
def test_the_clock_goes_on_when_all_would_rest(known) -> None:
    """Delays 3 and 2: after round 0 both would rest in round 1, at whose end client 1 arrives; so round 2 is next."""
    clients = Clients(FedBuff("3,2", clients=known), [8.0, 16.0])
    assert clients.asked() == [0, 1]
    assert clients.round() == 16.0
    assert int(clients.run.state["round"]) == 2
    assert clients.asked() == [1]
    """Client 0 arrives at the end of round 2, one step late; client 1 is under way."""
    assert clients.round() == pytest.approx(16.0 + 8.0 / 2**0.5, rel=1e-6)
    assert clients.asked() == [0]


def test_the_clock_does_not_skip_rounds_in_which_somebody_else_could_be_asked() -> None:
    clients = Clients(FedBuff("3,2", clients=3), [8.0, 16.0])
    assert clients.round() == 0.0
    assert int(clients.run.state["round"]) == 1
    assert clients.asked() == []


def test_the_clock_goes_on_in_rounds_whose_clients_all_rest() -> None:
    """Delay 3 of 9 clients: the one that is sampled thrice is asked once, and arrives at the end of the third round."""
    clients = Clients(FedBuff("3", clients=9), [8.0])
    assert clients.asked() == [0]
    assert clients.round() == 0.0
    for arrives in (0.0, 8.0):
        assert clients.asked() == []
        assert clients.round() == arrives
    assert clients.asked() == [0]


@settings(max_examples=25, deadline=None)
@given(
    delays=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    buffer=st.integers(0, 5),
    clients=st.integers(1, 5),
)
def test_somebody_is_asked_in_every_round_and_no_change_is_lost(delays, buffer, clients) -> None:
    """Every change is 1, so that a step is more than 0 and not more than 1."""
    federation = Clients(FedBuff(",".join(map(str, delays)), buffer=buffer, clients=clients), [1.0] * clients)
    held, before = 0, 0.0
    for _ in range(12):
        free = federation.asked()
        assert free
        after, state = federation.round(), federation.run.state
        left = sum(name.startswith("facts.") for name in state)
        if after == before:
            assert left == held + len(free)
        else:
            assert before < after <= before + 1.0 + 1e-6
            assert held + len(free) - left >= max(1, buffer)
            assert all(facts[0] >= state["round"] for name, facts in state.items() if name.startswith("facts."))
        held, before = left, after
    assert before > 0.0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), clients=st.integers(1, 5))
def test_with_no_delay_and_a_buffer_for_all_it_is_fedavg(seed, clients) -> None:
    runs = [Round.begin(strategy, start(seed=seed)) for strategy in (FedBuff("1", buffer=clients), FedAvg())]
    for number in range(3):
        updates = runs[0].train([2] * clients, seed=seed + number)
        one, other = [run.aggregate(updates) for run in runs]
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-6, atol=1e-6)


def test_changes_under_way_survive_being_saved(tmp_path) -> None:
    straight = Clients(FedBuff("1,3,4", buffer=2), [1.0, 2.0, 4.0], [1, 2, 3])
    for _ in range(2):
        straight.round()
    assert sum(name.startswith("pending.") for name in straight.run.state) == 4
    stopped = copy.deepcopy(straight)
    save_file(dict(stopped.run.state), tmp_path / "state.safetensors")
    stopped.run.state = load_file(tmp_path / "state.safetensors")
    stopped.run.strategy = FedBuff("1,3,4", buffer=2)
    for _ in range(6):
        assert straight.asked() == stopped.asked()
        assert straight.round() == stopped.round()


def test_the_order_of_arrival_changes_no_bit_with_changes_under_way() -> None:
    results = []
    for order in (1, -1):
        run = Round.begin(FedBuff("2,1,3"), start())
        for number in range(4):
            result = run.aggregate(run.train([2] * 5, seed=number)[::order])
        results.append(result)
    assert all(torch.equal(tensor, results[1].tensors[name]) for name, tensor in results[0].tensors.items())


def test_a_round_of_clients_without_examples_lets_time_pass_for_the_others() -> None:
    clients = Clients(FedBuff("1,2", clients=2), [8.0, 16.0])
    clients.round()
    idle = ClientUpdate(0, clients.run.adapters, examples=0)
    result = clients.run.aggregate([idle])
    assert result.tensors[A].item() == pytest.approx(8.0 + 16.0 / 2**0.5, rel=1e-6)
    with pytest.raises(ValueError, match="no client trained"):
        clients.run.aggregate([replace(idle)])


@pytest.mark.parametrize(
    "options",
    [
        {"delays": "0"},
        {"delays": "1,x"},
        {"delays": ""},
        {"delays": "1.5"},
        {"buffer": -1},
        {"eta": 0.0},
        {"clients": -1},
    ],
)
def test_options_that_are_none_are_refused(options) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        FedBuff(**options)


def test_a_single_delay_may_be_a_number() -> None:
    """As `--strategy.delays 2` is read."""
    assert FedBuff(2).delays == FedBuff("2").delays == [2]
