"""Who begins when: the seed, the round and the settings decide, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from fedsplit.federation.client_order import groups_of, takes_turns
from fedsplit.settings.documents import build


def order(round: int = 1, clients: object = range(8), **values: Any) -> list[list[int]]:
    return groups_of(
        build({name.replace("__", "."): value for name, value in values.items()}), round, clients, lambda _: 1
    )


def test_all_train_at_once_in_an_order_that_is_drawn_anew_each_round() -> None:
    rounds = [order(round) for round in (1, 2, 3)]
    assert all(len(groups) == 1 and sorted(groups[0]) == list(range(8)) for groups in rounds)
    assert len({tuple(groups[0]) for groups in rounds}) == 3
    assert order() == rounds[0] == order(clients=reversed(range(8)))
    assert order(seed=1) != rounds[0]
    assert order(trunk__order="cyclic") == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_of_those_that_train_every_one_is_in_one_group() -> None:
    values = {"deterministic": True, "trunk__group": 2, "trunk__order": "cyclic"}
    assert order(clients=[6, 1, 4, 3, 0], **values) == [[0, 1], [3, 4], [6]]
    assert order(clients=[], **values) == order(clients=[]) == []


@pytest.mark.parametrize(
    ("schedule", "every", "turns"),
    [
        ("shared", 0, True),
        ("batched", 0, True),
        ("accumulate", 0, False),
        ("accumulate", 2, True),
        ("copies", 0, False),
    ],
)
def test_turns_are_taken_where_the_order_decides_and_only_if_asked(schedule: str, every: int, turns: bool) -> None:
    values = {"trunk.schedule": schedule, "trunk.every": every}
    assert takes_turns(build(values | {"deterministic": True})) is turns
    assert not takes_turns(build(values))


def test_the_longest_begin_where_processes_play_and_no_order_is_promised() -> None:
    def begin(**values: Any) -> list[int]:
        steps = [3, 9, 3, 5]
        groups = groups_of(
            build({name.replace("__", "."): v for name, v in values.items()}), 1, range(4), steps.__getitem__
        )
        return [client for group in groups for client in group]

    drawn = begin(engine="local")
    assert begin() == sorted(drawn, key=[3, 9, 3, 5].__getitem__, reverse=True)
    assert begin()[:2] == [1, 3] and drawn[:2] != [1, 3]
    assert begin(deterministic=True) == drawn
    assert begin(trunk__order="cyclic") == [0, 1, 2, 3]
