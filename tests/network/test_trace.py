"""Traces: sorted, of the last attempt, and joined over the stages of a trunk."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fedsplit.network.trace import Crossing, Kind, Trace, joined_stages, settled


def crossing(client: int = 0, step: int = 0, kind: Kind = "forward", **values: int) -> Crossing:
    fields = {"round": 1, "attempt": 0, "batch": 0, "micro": 0, "up": 1, "down": 1} | values
    return Crossing(**fields, client=client, step=step, kind=kind)


PLACES: list[tuple[int, Kind]] = [(0, "backward"), (0, "forward"), (1, "forward")]


@given(order=st.permutations(range(6)))
def test_the_order_of_arrival_does_not_matter(order: list[int]) -> None:
    ordered = [crossing(client, step, kind) for client in (0, 1) for step, kind in PLACES]
    found = settled([ordered[place] for place in order], 1, [1, 0])
    assert found == {0: ordered[:3], 1: ordered[3:]}


def test_only_the_last_attempt_of_clients_that_count() -> None:
    kept = crossing(0, attempt=2)
    strangers = [crossing(0, attempt=1), crossing(1), crossing(0, round=2, attempt=5)]
    assert settled([*strangers, kept], 1, [0, 3]) == {0: [kept], 3: []}


def test_a_norm_is_added_to_the_last_answer() -> None:
    trace = Trace()
    trace.add(crossing())
    trace.add(crossing(step=1))
    trace.add_to_last(down=8)
    assert [one.down for one in trace.take()] == [1, 9]
    assert trace.take() == []


def test_stages_hand_hidden_states_up_and_gradients_down() -> None:
    """Each stage counts what it gets and gives: from and to clients, or the stages beside it."""
    lowest = [crossing(up=10, down=11), crossing(kind="backward", up=12, down=13)]
    highest = [crossing(up=20, down=21), crossing(kind="backward", up=22, down=23)]
    joined = joined_stages([lowest, highest])
    assert joined == (replace(lowest[0], up=10, down=21), replace(lowest[1], up=22, down=13))
    assert joined_stages([lowest, highest[:1]]) == joined[:1]
