"""Who introduces itself is counted before anything is trained."""

from __future__ import annotations

import pytest

from fedsplit.federation.clients import FederationFailed, check_introductions
from fedsplit.federation.replies import Introduction
from fedsplit.updates import Adapters

NOTHING = Adapters({}, {})
START = {"bottom": NOTHING, "top": NOTHING}


def introduced(client: int, start: dict[str, Adapters] | None = None) -> Introduction:
    return Introduction(client, f"owner {client}", {}, START if client == 0 and start is None else start or {})


def test_all_clients_in_any_order_are_enough() -> None:
    check_introductions([introduced(2), introduced(0), introduced(1)], 3)


@pytest.mark.parametrize(
    ("introductions", "words"),
    [
        ([introduced(0), introduced(1), introduced(1)], "two nodes say that they are client 1"),
        ([introduced(0), introduced(3), introduced(1)], "two nodes say that they are client 3, or there is none"),
        ([introduced(0), introduced(-1), introduced(1)], "client -1, or there is none of that number"),
        ([introduced(0), introduced(2)], "only 2 of 3 clients could load their parts"),
        ([], "only 0 of 3 clients"),
        ([introduced(0, {"top": NOTHING}), introduced(1), introduced(2)], "the first client did not say what"),
    ],
    ids=["twice", "too large", "negative", "too few", "nobody", "no start"],
)
def test_anything_else_ends_the_run(introductions: list[Introduction], words: str) -> None:
    with pytest.raises(FederationFailed, match=words):
        check_introductions(introductions, 3)
