"""Max-min fairness: properties of the rates, and of flows on a virtual clock."""

from __future__ import annotations

import random

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.network.fair_share import SharedLink, fair_rates

LIMITS = st.lists(st.floats(0.1, 100), min_size=1, max_size=8)


@given(limits=LIMITS, capacity=st.floats(0.1, 500))
def test_rates_are_feasible_efficient_and_fair(limits: list[float], capacity: float) -> None:
    rates = fair_rates(limits, capacity)
    assert sum(rates) == pytest.approx(min(capacity, sum(limits)))
    assert all(0 < rate <= limit for rate, limit in zip(rates, limits, strict=True))
    # Max-min: a flow below its limit has the largest rate, so that nobody with less could give it more.
    largest = max(rates)
    for rate, limit in zip(rates, limits, strict=True):
        assert rate == pytest.approx(limit) or rate == pytest.approx(largest)


@given(limits=LIMITS, capacity=st.floats(0.1, 500), order=st.randoms())
def test_rates_do_not_depend_on_the_order(limits: list[float], capacity: float, order: random.Random) -> None:
    places = list(range(len(limits)))
    order.shuffle(places)
    shuffled = fair_rates([limits[place] for place in places], capacity)
    rates = fair_rates(limits, capacity)
    assert shuffled == pytest.approx([rates[place] for place in places])


def ends(flows: list[tuple[float, float, float]], capacity: float, sum_of_limits: float = 1e9) -> list[float]:
    """The times at which flows end, given as start, bytes and limit."""
    env = simpy.Environment()
    link = SharedLink(env, capacity, sum_of_limits)
    found = [0.0] * len(flows)

    def flow(place: int, start: float, nbytes: float, limit: float):
        yield env.timeout(start)
        yield link.send(nbytes, limit)
        found[place] = env.now

    for place, one in enumerate(flows):
        env.process(flow(place, *one))
    env.run()
    return found


def test_a_flow_that_comes_later_slows_the_first() -> None:
    """10 bytes alone at 10 a second for half a second, then 5 a second each; the first ends after 1.5 s, by hand."""
    assert ends([(0, 10, 100), (0.5, 10, 100)], capacity=10) == pytest.approx([1.5, 2.0])


def test_a_slow_client_leaves_its_share_to_the_others() -> None:
    assert ends([(0, 2, 2), (0, 8, 100)], capacity=10) == pytest.approx([1.0, 1.0])


def test_a_link_with_room_for_all_is_no_link() -> None:
    flows = [(0.0, 3.0, 2.0), (0.25, 5.0, 4.0)]
    assert ends(flows, capacity=6, sum_of_limits=6) == ends(flows, capacity=1e12) == pytest.approx([1.5, 1.5])


@given(
    flows=st.lists(st.tuples(st.floats(0, 3), st.floats(0.1, 50), st.floats(0.1, 20)), min_size=1, max_size=6),
    capacity=st.floats(0.1, 30),
)
def test_no_flow_is_faster_than_its_limit_and_the_link_never_carries_too_much(
    flows: list[tuple[float, float, float]], capacity: float
) -> None:
    found = ends(flows, capacity)
    for end, (start, nbytes, limit) in zip(found, flows, strict=True):
        assert end >= start + nbytes / min(limit, capacity) - 1e-6
    assert max(found) >= min(start for start, _, _ in flows) + sum(nbytes for _, nbytes, _ in flows) / capacity - 1e-6
