"""Who gets how much of the machine."""

from __future__ import annotations

import os

import pytest

from fedsplit.engines import planning
from fedsplit.errors import SettingError
from fedsplit.settings.documents import build


def test_threads_never_outnumber_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    plans = {
        (clients, workers): planning.plan(build({"clients": clients, "workers": workers}))
        for clients in (1, 3, 20)
        for workers in (0, 2)
    }
    assert plans[1, 0] == planning.Plan(1, 4, 4, 2, 1)
    assert plans[3, 0] == planning.Plan(3, 1, 4, 2, 1)
    assert plans[20, 0] == planning.Plan(8, 1, 1, 1, 2)
    assert plans[20, 2] == planning.Plan(2, 2, 4, 2, 1)
    asked = build({"clients": 20, "threads": 3, "trunk.threads": 5, "train.micro_batches": 4})
    assert planning.plan(asked) == planning.Plan(8, 3, 5, 4, 2)
    assert planning.plan(build({"clients": 1, "trunk.schedule": "batched"})).micro_batches == 1


@pytest.mark.parametrize("values", [{"deterministic": True}, {"trunk.memory": "2GB"}, {"trunk.lanes": 1}])
def test_there_is_one_lane_where_one_thing_is_computed_at_a_time(
    values: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)), raising=False)
    assert planning.plan(build({"clients": 4})).trunk_lanes == 2
    assert planning.plan(build({"clients": 4, **values})).trunk_lanes == 1
    assert planning.plan(build({"clients": 1, "trunk.lanes": 2})).trunk_lanes == 2


def test_a_large_model_is_worth_a_second_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)), raising=False)
    eight = {"clients": 8, "train.batch_size": 4, "train.max_length": 64}
    assert planning.plan(build(eight), width=768).micro_batches == 2  # 128 tokens * 768 ** 2 = 75 million
    assert planning.plan(build(eight), width=128).micro_batches == 1
    assert planning.plan(build(eight)).micro_batches == 1
    assert planning.plan(build({**eight, "trunk.schedule": "batched"}), width=768).micro_batches == 1
    assert planning.plan(build({**eight, "train.batch_size": 1}), width=4096).micro_batches == 1
    assert planning.plan(build({**eight, "dtype": "bf16"}), width=768).micro_batches == 1


@pytest.mark.parametrize("values", [{"trunk.schedule": "copies"}, {"deterministic": True}])
def test_threads_do_not_depend_on_workers_where_the_result_must_not(
    values: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    plans = [planning.plan(build({"clients": 4, "workers": workers, **values})) for workers in (1, 2, 4)]
    assert [plan.workers for plan in plans] == [1, 2, 4]
    assert {(plan.client_threads, plan.trunk_threads, plan.micro_batches) for plan in plans} == {(1, 4, 2)}


def test_workers_of_the_local_engine_train_at_once_where_the_order_of_clients_may_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    local = {"engine": "local", "clients": 4}
    assert planning.plan(build(local)) == planning.Plan(1, 8, 8, 1, 1)
    assert planning.plan(build({**local, "workers": 4})) == planning.Plan(4, 2, 2, 1, 1)
    assert planning.plan(build({**local, "workers": 4, "clients": 1})) == planning.Plan(1, 8, 8, 1, 1)
    for fixed in ({"deterministic": True}, {"trunk.schedule": "copies"}):
        assert planning.plan(build({**local, **fixed})).workers == 1
        with pytest.raises(SettingError, match="workers: 2 is not possible; allowed: 0 or 1"):
            planning.plan(build({**local, **fixed, "workers": 2}))
