"""Limits of a server: each is a name, a status and a line."""

from __future__ import annotations

import pytest

from fedsplit.errors import SettingError
from fedsplit.wire.chunks import Refused
from fedsplit.wire.limits import Admissions, Limits, RateLimit


@pytest.mark.parametrize("name", [name for name in vars(Limits()) if name != "rate"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"^{name}: 0 is not possible; allowed: a number of at least"):
        Limits(**{name: 0})


def test_a_rate_is_an_average() -> None:
    now = [0.0]
    limit = RateLimit(100, lambda: now[0])
    limit.take(900)
    now[0] = 1.0
    limit.take(200)
    with pytest.raises(Refused, match="more than 100 bytes a second came") as refused:
        limit.take(1)
    assert refused.value.status == "RESOURCE_EXHAUSTED"
    now[0] = 1000.0  # a long pause is worth ten seconds
    limit.take(1000)
    with pytest.raises(Refused):
        limit.take(1)


def test_without_a_rate_any_number_of_bytes_may_come() -> None:
    RateLimit(0, lambda: 0.0).take(10**15)


def test_places_are_free_again_after_the_end_of_a_stream() -> None:
    admissions = Admissions(Limits(clients=2, streams=2))
    leave = [admissions.enter("a"), admissions.enter("a"), admissions.enter("b")]
    with pytest.raises(Refused, match="the client has 2 streams already"):
        admissions.enter("a")
    with pytest.raises(Refused, match="the trunk has 2 clients, and takes no more"):
        admissions.enter("c")
    leave[0]()
    admissions.enter("a")
    leave[2]()
    admissions.enter("c")
