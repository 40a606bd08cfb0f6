"""The cost of a round; tests/events/test_run_events.py holds the sums over whole runs."""

from __future__ import annotations

import time

import pytest

from fedsplit.federation.round_cost import Cost
from fedsplit.federation.run_state import RunState
from fedsplit.federation.run_totals import RunTotals
from fedsplit.trunk.status import Traffic


def state() -> RunState:
    parts: dict[str, object] = dict.fromkeys(("adapters", "trunk", "moments", "ledger", "stopping"))
    return RunState(totals=RunTotals(time.perf_counter() - 10), **parts)  # type: ignore[arg-type]


def test_what_belongs_to_no_phase_is_told_apart_and_speeds_are_by_the_clients_own_time() -> None:
    traffic = Traffic()
    traffic.activation.add(client=1, up=8, down=4)
    traffic.activation.framing.add(client=1, up=300, down=200)
    traffic.evaluation_activation.packets.add(client=0, up=2, down=2)
    cost = Cost(seconds={"training": 4.0}, tokens={0: 6, 1: 10}, training={0: 0.0, 1: 2.0})
    event = cost.event(state(), 1, traffic, lambda client: "ab"[client])
    assert event.seconds["other"] == pytest.approx(6, abs=1)
    assert event.tokens_per_second == 4.0 and event.client_tokens_per_second == {"b": 5.0}
    assert event.client_bytes == {"activation_up": {"b": 8}, "activation_down": {"b": 4}}
    assert event.framing == {"activation_up": 300, "activation_down": 200}
    assert event.client_framing == {"activation_up": {"b": 300}, "activation_down": {"b": 200}}
    assert event.packets == {"evaluation_up": 2, "evaluation_down": 2}
    assert event.client_packets == {"evaluation_up": {"a": 2}, "evaluation_down": {"a": 2}}


def test_a_round_without_training_has_no_speed() -> None:
    event = Cost().event(state(), 1, Traffic(), str)
    assert event.tokens_per_second is None and event.client_bytes == {} and event.client_seconds == {}
