"""One optimiser for all replicas: who is waited for, who is late, and what becomes of a step that cannot be made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsplit.settings.sections import TrainSettings
from fedsplit.trunk.status import RoundCounts
from fedsplit.trunk.step_sync import LocalPeers, Master, Mirror, Share
from fedsplit.trunk.trainable import TrainableAdapter, Unusable

SGD = TrainSettings(optimizer="sgd", lr=1.0)
START = {"w": torch.zeros(2)}


def make() -> TrainableAdapter:
    return TrainableAdapter(START, SGD, learns=True)


def share(value: float, count: int = 1, version: int = 0) -> Share:
    return Share({"w": torch.full((2,), value)}, count, (1.0,) * max(count, 1), 1, version)


def beside(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Makes a call in a thread."""
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(call())
        except Exception as error:  # noqa: BLE001  # the test looks at it
            results.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, results


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    pytest.fail("it did not happen")


@pytest.mark.parametrize(("counts", "expected"), [((1, 3), -(2.0 + 6.0) / 4), ((0, 0), -8.0)])
def test_a_step_is_made_once_with_the_mean_or_the_sum_of_all_shares(counts: tuple[int, int], expected: float) -> None:
    master = Master(make, 2, patience=None)
    for replica in (0, 1):
        master.enter(replica)
    thread, first = beside(lambda: master.step(0, share(2.0, counts[0])))
    wait_for(lambda: bool(master._exchange.shares))
    second = master.step(1, share(6.0, counts[1]))
    thread.join(30)
    assert torch.equal(second.tensors["w"], torch.full((2,), expected))
    assert first[0].version == second.version == 1 and second.steps == 1


def test_who_has_left_or_never_came_is_not_waited_for() -> None:
    master = Master(make, 3, patience=None)
    assert master.step(0, share(1.0)).steps == 1  # nobody else has entered
    master.enter(1)
    thread, results = beside(lambda: master.step(0, share(1.0, version=1)))
    wait_for(lambda: bool(master._exchange.shares))
    assert thread.is_alive()
    master.leave(1)
    thread.join(30)
    assert results[0].steps == 2


def test_a_late_replica_is_waited_for_until_the_deadline_and_its_share_is_dropped() -> None:
    master = Master(make, 2, patience=0.05)
    master.enter(1)
    in_time = master.step(0, share(1.0))
    assert (in_time.steps, in_time.is_late) == (1, False)
    counts = RoundCounts()
    adapter = make()
    mirror = Mirror(LocalPeers(master, 1), adapter, counts)
    assert not mirror.step({"w": torch.full((2,), 100.0)}, 1, [1.0], 1)
    assert torch.equal(adapter.snapshot["w"].detach(), in_time.tensors["w"])
    assert counts.steps == 1  # the step that was made without it
    assert mirror.step({"w": torch.zeros(2)}, 1, [1.0], 1)  # it is in time again


def test_the_last_step_of_a_round_waits_for_all_replicas_also_for_those_with_nothing_to_add() -> None:
    master = Master(make, 2, patience=None)
    thread, results = beside(lambda: master.close(0, share(3.0, count=0)))
    wait_for(lambda: bool(master._closing.shares))
    assert thread.is_alive()
    master.close(1, Share())
    thread.join(30)
    assert torch.equal(results[0].tensors["w"], torch.full((2,), -3.0))
    thread, results = beside(lambda: master.close(0, Share()))
    assert master.close(1, Share()).version == 1  # nothing was added, so nothing changed
    thread.join(30)


def test_a_step_that_cannot_be_made_is_refused_to_all_and_changes_nothing() -> None:
    master = Master(make, 2, patience=None)
    master.enter(1)
    thread, results = beside(lambda: master.step(0, share(float("nan"))))
    wait_for(lambda: bool(master._exchange.shares))
    with pytest.raises(Unusable):
        master.step(1, share(1.0))
    thread.join(30)
    assert isinstance(results[0], Unusable)
    assert master.newest(0) is None
    master.leave(1)
    assert master.step(0, share(1.0)).steps == 1


def test_a_replica_whose_step_is_dropped_gets_the_adapter_that_was_written() -> None:
    """Such as for a round that is played again: nobody waits for a step that nobody will make."""
    master = Master(make, 2, patience=None)
    master.enter(1)
    thread, results = beside(lambda: master.step(0, share(1.0)))
    wait_for(lambda: bool(master._exchange.shares))
    master.write({"w": torch.full((2,), 5.0)})
    thread.join(30)
    (newest,) = results
    assert newest.is_late and newest.steps == 0
    assert torch.equal(newest.tensors["w"], torch.full((2,), 5.0))


def test_a_mirror_tells_once_that_it_is_attended_and_follows_every_change() -> None:
    told: list[str] = []

    class Peers(LocalPeers):
        def enter(self) -> None:
            told.append("enter")

        def leave(self) -> None:
            told.append("leave")

    master = Master(make, 2, patience=None)
    adapter = make()
    mirror = Mirror(Peers(master, 1), adapter, RoundCounts())
    for is_attended in (False, True, True, False, False):
        mirror.attend(is_attended)
    assert told == ["enter", "leave"]
    master.write({"w": torch.full((2,), 5.0)}, {})
    mirror.refresh()
    assert torch.equal(adapter.snapshot["w"].detach(), torch.full((2,), 5.0))
    before = adapter.snapshot
    mirror.refresh()
    assert adapter.snapshot is before  # nothing has changed, so pending forwards are not late
