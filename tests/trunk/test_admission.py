"""Who is admitted: reservations, leases, and what must go so that others find room. Numbers are worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsplit.trunk.admission import TRANSIT, Admission
from fedsplit.trunk.memory import Budget
from fedsplit.trunk.pending import Output, PendingBatch
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import Steps

LEASE = 10.0


class Desk:
    """An admission, its steps, a clock, and a process whose memory is set by hand. A step has 4 tokens of 10 bytes."""

    def __init__(self, limit: int | None, graph: int = 25) -> None:
        self.now, self.resident = 0.0, 0
        self.budget = Budget(limit, resident=lambda: self.resident, release=lambda: None)
        self.budget.learn(tokens=1, graph=graph, working=0)
        self.steps: Steps[Any] = Steps("", "", LEASE, lambda: self.now)
        self.admission = Admission(self.budget, self.steps, LEASE, lambda: self.now)

    def reserve(self, client: int) -> bool:
        return self.admission.reserve(StepKey(1, client, 0), tokens=4, nbytes=40)

    def pend(self, client: int) -> PendingBatch:
        """A pending batch with its graph, whose hidden states have 40 bytes."""
        key, adapter = StepKey(1, client, 0), None
        batch = PendingBatch({key: torch.zeros(1, 4, 10, dtype=torch.int8)}, {}, adapter, {}, 0)  # type: ignore[arg-type]
        batch.output = Output(torch.zeros(1), {})
        self.steps.begin(key, batch)
        return batch


def test_a_reservation_counts_for_hidden_states_and_gradient_until_it_is_kept_or_over() -> None:
    """Computing takes 100; the packet and its gradient 2 * 3 * 40 = 240, and so do those of each reservation before."""
    assert TRANSIT == 3
    desk = Desk(limit=100 + 2 * 240)
    assert [desk.reserve(client) for client in (0, 1, 2)] == [True, True, False]
    assert [desk.admission.has_reserved(StepKey(1, client, 0)) for client in (0, 1, 2)] == [True, True, False]
    desk.admission.redeem([StepKey(1, 0, 0), StepKey(1, 7, 0)])
    assert desk.reserve(2)
    assert not desk.reserve(3)
    desk.admission.leave(1)
    assert desk.reserve(3)
    desk.now = LEASE
    desk.admission.expire()
    assert [desk.reserve(client) for client in (4, 5, 6)] == [True, True, False]


def test_the_gradient_of_a_pending_step_has_its_room() -> None:
    """Its hidden states lie there already: 3 * 40 = 120 more are to come."""
    assert not Desk(limit=100 + 240 - 1).reserve(1)
    for limit, expected in ((100 + 240 + 120, True), (100 + 240 + 120 - 1, False)):
        desk = Desk(limit)
        desk.pend(0)
        assert desk.reserve(1) is expected


def test_others_graphs_go_first_but_not_the_own() -> None:
    desk = Desk(limit=200)
    own, other = desk.pend(0), desk.pend(1)
    assert desk.admission.make_room(4, 0.0, own)
    assert own.output is not None and other.output is not None
    desk.resident = 150
    assert not desk.admission.make_room(4, 0.0, own)
    assert own.output is not None and other.output is None


def test_answers_that_are_kept_go_where_nothing_is_pending() -> None:
    desk = Desk(limit=200)
    desk.pend(0)
    desk.steps.answer(StepKey(1, 0, 0), Packet(StepKey(1, 0, 0)))
    desk.resident = 150
    assert not desk.admission.make_room(4, 0.0)
    assert desk.steps.answered(StepKey(1, 0, 0)) is None


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, ("graph", 4)), (4000, ("graph", 4)), (1439, ("input", 4)), (719, ("input", 2)), (200, ("none", 0))],
)
def test_as_many_of_a_batch_as_find_room_are_served(limit: int | None, expected: tuple[str, int]) -> None:
    """Of n steps computing takes 100 n, a graph as much again, and what is kept in any case 4 * 40 n = 160 n."""
    desk = Desk(limit)
    assert desk.admission.room([torch.zeros(1, 4, 10, dtype=torch.int8)] * 4) == expected
