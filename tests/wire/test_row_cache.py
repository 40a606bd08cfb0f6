"""The cache of rows: equal on both sides, within its budget, and back at the last round that counted."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsplit.wire.codecs import Role
from fedsplit.wire.packets import StepKey
from fedsplit.wire.row_cache import RowCache


def role_of(step: int, **facts: int) -> Role:
    return Role("activation", "up", StepKey(**{"round": 1, "client": 0, "step": step, **facts}))


def rows(*examples: int, value: float = 1.0) -> dict[int, Tensor]:
    return {example: torch.full((1, 1), float(value)) for example in examples}


def test_the_rows_that_were_used_least_recently_leave() -> None:
    cache = RowCache(budget=3 * 4)
    for step, examples in enumerate([(1, 2), (3,), (1,), (4,)]):
        cache.set_after(role_of(step), rows(*examples))
    assert list(cache.before(role_of(4))) == [3, 1, 4]


def test_a_row_beyond_the_budget_is_not_kept() -> None:
    cache = RowCache(budget=4)
    cache.set_after(role_of(0), {1: torch.ones(2, 1)})
    assert not cache.before(role_of(1)) and not cache.states()


def test_the_order_of_the_micro_batches_does_not_matter() -> None:
    caches = [RowCache(budget=8), RowCache(budget=8)]
    for micro in (0, 1, 0):
        caches[0].set_after(role_of(0, micro=micro), rows(5 - micro, 7, value=micro))
    for micro in (1, 0):
        caches[1].set_after(role_of(0, micro=micro), rows(5 - micro, 7, value=micro))
    found = [cache.before(role_of(1)) for cache in caches]
    assert [list(rows) for rows in found] == [[5, 7], [5, 7]]
    assert [float(rows[7]) for rows in found] == [1.0, 1.0]


def test_each_attempt_begins_with_the_rows_of_the_last_round_that_counted() -> None:
    cache = RowCache(budget=100)
    cache.set_after(role_of(0), rows(1))
    cache.restore(cache.states())
    cache.set_after(role_of(0, round=2), rows(1, 2, value=2.0))
    assert float(cache.before(role_of(1, round=2))[1]) == 2.0
    again = cache.before(role_of(0, round=2, attempt=1))
    assert list(again) == [1] and float(again[1]) == 1.0
    # A packet that came late neither finds nor changes anything.
    cache.set_after(role_of(5, round=2), rows(9))
    assert not cache.before(role_of(5, round=2))
    assert list(cache.before(role_of(1, round=2, attempt=1))) == [1]


def test_the_order_of_use_survives_a_checkpoint() -> None:
    cache = RowCache(budget=100)
    for step, example in enumerate(range(12, 0, -1)):
        cache.set_after(role_of(step), rows(example))
    states = {client: dict(sorted(own.items())) for client, own in cache.states().items()}
    restored = RowCache(budget=100)
    restored.restore(states)
    assert list(restored.before(role_of(0, round=2))) == list(range(12, 0, -1))
    assert restored.states()[0].keys() == states[0].keys()


def test_clients_and_roles_have_rows_of_their_own() -> None:
    cache = RowCache(budget=100)
    cache.set_after(role_of(0), rows(1))
    assert not cache.before(role_of(1, client=1))
    assert not cache.before(Role("gradient", "up", StepKey(1, 0, 1)))
    assert not cache.before(Role("activation", "up", StepKey(1, 0, 1), training=False))
