"""Settings: one list, three sources, clear refusals."""

from __future__ import annotations

from fedsplit.documents import build
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.codecs import make_codec


def test_the_lists_of_names_are_those_of_the_code() -> None:
    from fedsplit.allowed import CODECS
    from fedsplit.allowed import SCHEDULES as NAMES

    assert tuple(SCHEDULES) == NAMES
    assert [make_codec(name).name for name in CODECS] == list(CODECS)


def test_no_budget_is_none_and_another_is_bytes() -> None:
    assert build({"trunk.memory": ""}).trunk.memory_bytes is None
    assert build({"trunk.memory": "2GiB"}).trunk.memory_bytes == 2**31
