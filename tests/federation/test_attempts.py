"""Attempts: numbers that only grow, and a limited number of tries."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedsplit.federation.attempts import TRIES, Attempt


def test_a_client_has_a_limited_number_of_tries() -> None:
    attempt = Attempt()
    assert [attempt.begin_again(client=1) for _ in range(TRIES)] == [True] * (TRIES - 1) + [False]
    assert attempt.begin_again(client=2)


@given(st.lists(st.sampled_from(["client", "round"]), max_size=30))
def test_what_a_clients_steps_carry_only_grows(losses: list[str]) -> None:
    """The trunk refuses a step of an attempt that lies behind its client, and serves no step twice."""
    attempt, seen = Attempt(), [0]
    for lost in losses:
        if lost == "client" and not attempt.begin_again(client=0):
            lost = "round"
        if lost == "round":
            attempt = Attempt(attempt.number + 1)
        assert attempt.of(client=0) > seen[-1]
        seen.append(attempt.of(client=0))
