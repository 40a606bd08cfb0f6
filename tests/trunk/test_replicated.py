"""Replicas of the trunk: who has which, what is averaged, and what stays as with one trunk."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import same_numbers
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_local import RAW, config_of, packet
from torch import Tensor

from fedsplit.trunk.doors import join, weigh
from fedsplit.trunk.local import LocalTrunk, load_trunks
from fedsplit.trunk.port import TrunkPort
from fedsplit.trunk.replicated import ReplicatedTrunk, replicas_of
from fedsplit.wire.packets import Packet, StepKey

ALONE = ["copies", "frozen", "fold", "resumed"]
"""Cases in which the trunks of clients share nothing that learns."""


@given(st.integers(1, 200), st.integers(1, 12))
def test_every_replica_has_as_many_clients_as_any_other_give_or_take_one(clients: int, replicas: int) -> None:
    weights = [1.0] * replicas
    counts = Counter({replica: 0 for replica in range(replicas)} | Counter(replicas_of(clients, weights)))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert replicas_of(clients, weights) == replicas_of(clients, [7.0] * replicas)


@given(st.integers(10, 200), st.lists(st.floats(0.1, 10), min_size=2, max_size=5))
def test_weights_decide_how_many_clients_a_replica_has_and_each_has_one_at_least(
    clients: int, weights: list[float]
) -> None:
    counts = Counter(replicas_of(clients, weights))
    assert len(counts) == len(weights)
    for replica, weight in enumerate(weights):
        fair = clients * weight / sum(weights)
        assert counts[replica] <= max(2, fair + len(weights))


@pytest.mark.parametrize("case", ALONE)
@pytest.mark.parametrize("stages", ["", "0:1:2"])
def test_where_no_adapter_is_shared_replicas_change_no_number(
    case: str, stages: str, tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    found = []
    for replicas in (1, 2):
        settings = {"cut": "0:2", "lora.dropout": 0.1, "trunk.replicas": replicas, "trunk.stages": stages}
        found.append(same_numbers.play(case, tiny_models, corpus_file, tmp_path / str(replicas), settings))
    assert found[0] == found[1]


def trunks_of(tiny_models: dict[str, Path], **settings: Any) -> tuple[list[list[LocalTrunk]], TrunkPort]:
    config = config_of(tiny_models, **{"clients": 4, "train__lr": 0.01, **settings})
    trunks = load_trunks(config, "run", "first", callers=config.clients)
    return trunks, join(config, trunks)


def train(port: TrunkPort, clients: Sequence[int], steps: int = 1, round: int = 1) -> None:
    for client in clients:
        for step in range(steps):
            for what in ("hidden", "gradient"):
                size = 1.0 if what == "hidden" else 0.01  # gradients of a loss are small
                values = size * RAW.decode(packet(client, what, step).tensors[what])
                key = StepKey(round, client, step, run="run")
                port.send(Packet(key, {what: RAW.encode(values)}, incarnation="first"))()
        port.leave(client)


def test_a_round_ends_with_the_mean_by_what_each_has_trained(tiny_models: dict[str, Path]) -> None:
    trunks, port = trunks_of(tiny_models, trunk__replicas=2)
    mine = [client for client in range(4) if replicas_of(4, [1, 1])[client] == 0]
    other = [client for client in range(4) if replicas_of(4, [1, 1])[client] == 1]
    start = port.read().tensors
    train(port, mine, steps=2)
    train(port, other[:1])
    first, second = (stages[0].read().tensors for stages in trunks)
    moments = [stages[0].moments() for stages in trunks]
    counts = port.end_round([*mine, other[0]])
    assert counts.steps == 5 and counts.sequences == 10  # packets of two sequences
    for name, tensor in port.read().tensors.items():
        expected = (4 * first[name].double() + first[name].double() * 0 + second[name].double()) / 5
        assert torch.allclose(tensor.double(), expected, atol=1e-7) and not torch.equal(tensor, start[name])
        kind = f"{name}:exp_avg"
        joined = (4 * moments[0][kind].double() + moments[1][kind].double()) / 5
        for stages in trunks:
            assert torch.equal(stages[0].read().tensors[name], tensor)
            assert torch.allclose(stages[0].moments()[kind].double(), joined, atol=1e-9)


def test_a_replica_without_training_counts_for_nothing_and_gets_the_others_adapter(
    tiny_models: dict[str, Path],
) -> None:
    trunks, port = trunks_of(tiny_models, trunk__replicas=2)
    client = replicas_of(4, [1, 1]).index(1)
    train(port, [client])
    learned = trunks[1][0].read().tensors
    port.end_round([client])
    assert all(torch.equal(tensor, learned[name]) for name, tensor in port.read().tensors.items())
    port.end_round([])  # nobody has trained since


def test_a_discarded_round_leaves_no_trace_at_any_replica(tiny_models: dict[str, Path]) -> None:
    trunks, port = trunks_of(tiny_models, trunk__replicas=2)
    before, moments = port.read().tensors, port.moments()
    train(port, range(4))
    port.end_round([])
    port.restore(before, moments)
    for stages in trunks:
        assert all(torch.equal(tensor, before[name]) for name, tensor in stages[0].read().tensors.items())
        assert not stages[0].moments()


def learn_together(port: TrunkPort, clients: Sequence[int], steps: int, round: int) -> None:
    """Trains all clients at once, each in a thread, in a group."""
    errors: list[Exception] = []

    def play(client: int) -> None:
        try:
            train(port, [client], steps, round)
        except Exception as error:  # noqa: BLE001  # shown by the thread of the test
            errors.append(error)

    port.begin(clients)
    threads = [threading.Thread(target=play, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("schedule", ["batched", "accumulate"])
@pytest.mark.parametrize(("replicas", "stages"), [(2, ""), (3, ""), (2, "0:1:2")])
def test_replicas_that_sum_their_gradients_learn_as_one_trunk(
    schedule: str, replicas: int, stages: str, tiny_models: dict[str, Path]
) -> None:
    found = []
    for count in (1, replicas):
        settings: dict[str, Any] = {"trunk__schedule": schedule, "trunk__replicas": count, "trunk__stages": stages}
        # Without dropout, whose masks are drawn for a whole batch. AdamW would turn the sign of a tiny gradient into a
        # step of the full size.
        settings |= {"model": str(tiny_models["llama"]), "train__optimizer": "sgd", "train__momentum": 0.9}
        settings |= {"lora__dropout": 0.0, "cut": "0:2", "deterministic": True, "trunk__group": 4, "workers": 4}
        settings |= {"trunk__sync": "step"} if count > 1 else {}
        trunks, port = trunks_of(tiny_models, **settings)
        start = dict(port.read().tensors)
        counts = []
        for round in (1, 2):
            learn_together(port, range(4), 3, round)
            counts.append(port.end_round(range(4)))
        found.append((port.read().tensors, port.moments(), [one.steps for one in counts]))
        assert difference(start, found[-1][0]) > 1e-3
        for all_stages in trunks:  # every replica has the adapter of the first
            for mine, first in zip(all_stages, trunks[0], strict=True):
                assert difference(dict(mine.read().tensors), dict(first.read().tensors)) == 0
    (one, one_moments, one_steps), (several, moments, steps) = found
    assert steps == one_steps
    assert difference(dict(one), dict(several)) < 1e-6
    assert difference(one_moments, moments) < 1e-4


def test_weights_are_measured_where_asked_for_and_clients_follow_them(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trunks, _ = trunks_of(tiny_models, trunk__replicas=2, trunk__weights="speed")
    config = config_of(tiny_models, clients=8, trunk__replicas=2, trunk__weights="speed")
    before = trunks[0][0].read().tensors
    measured = weigh(config, join(config, trunks))
    speeds = measured.trunk.replica_weights
    assert len(speeds) == 2 and all(speed > 0 for speed in speeds)
    assert difference(dict(before), dict(trunks[0][0].read().tensors)) == 0
    monkeypatch.setattr(ReplicatedTrunk, "speeds", lambda self: [300.0, 100.0])
    assert Counter(replicas_of(8, weigh(config, join(config, trunks)).trunk.replica_weights)) == {0: 6, 1: 2}
    by_hand = config_of(tiny_models, clients=8, trunk__replicas=2, trunk__weights="1,3")
    assert weigh(by_hand, join(by_hand, trunks)) == by_hand


def test_a_replica_that_waits_for_another_one_is_freed_by_the_end_of_the_round(tiny_models: dict[str, Path]) -> None:
    """A client of the other replica is lost: nobody can make the step, and the round is discarded."""
    settings = {"trunk__schedule": "batched", "trunk__sync": "step", "trunk__replicas": 2, "deterministic": True}
    _, port = trunks_of(tiny_models, trunk__group=2, workers=2, **settings)
    waits = replicas_of(4, [1, 1]).index(0)
    port.begin([waits, replicas_of(4, [1, 1]).index(1)])
    thread = threading.Thread(target=train, args=(port, [waits]), daemon=True)
    thread.start()
    thread.join(1)
    assert thread.is_alive()
    port.begin([])
    thread.join(30)
    assert not thread.is_alive()
    assert port.end_round([]).steps == 1


def test_memory_of_a_process_is_counted_once(tiny_models: dict[str, Path]) -> None:
    _, port = trunks_of(tiny_models, trunk__replicas=3, cut="0:2", trunk__stages="0:1:2")
    status = port.status()
    assert status.resident_memory < 1.5 * psutil.Process().memory_info().rss
    assert status.peak_memory >= status.resident_memory * 0.9
