"""Events in their JSON form, whose keys are those that were always written."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timedelta

import pytest

from fedsplit.events import Notice, RoundEvaluated, RoundTrained, RunStarted
from fedsplit.events.event_types import EVENTS, Event, fields_of

TRAINED = {
    "round": 1,
    "loss": None,
    "clients": {"ann": 2.5},
    "tokens": 10,
    "seconds": 0.5,
    "trunk": {"steps": 3},
    "elapsed": 2.0,
}


def started(folder: str) -> RunStarted:
    return RunStarted(
        settings={"lora": {"rank": 4}},
        versions={"torch": "2"},
        clients=["ann", "bob"],
        parameters={"trunk": {"total": 2, "trainable": 1}},
        aggregated_parts=["bottom"],
        after_round=0,
        folder=folder,
    )


def evaluated(round: int) -> RoundEvaluated:
    return RoundEvaluated(
        round=round,
        loss=3.0,
        clients={"ann": 2.5, "bob": 3.5},
        forgotten={},
        adapter_bytes={},
        bytes={},
        tokens=8,
        seconds=0.5,
        elapsed=2.0,
    )


def test_the_form_for_json_has_the_fields_and_what_is_not_there_is_left_out() -> None:
    document = json.loads(json.dumps(RoundTrained(**TRAINED).to_document()))
    assert document.pop("time")
    assert document == {"event": "train", **TRAINED}
    document = RoundTrained(**TRAINED, router_aux_loss=1.5, learning_rate=0.1).to_document()
    assert (document["router_aux_loss"], document["learning_rate"]) == (1.5, 0.1)


def test_time_is_that_of_the_event_in_utc() -> None:
    one, two = (datetime.fromisoformat(Notice(text="x").time) for _ in range(2))
    assert one.utcoffset() == timedelta(0)
    assert one <= two


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.__name__)
def test_every_event_is_frozen_documented_and_has_a_name_of_its_own(kind: type[Event]) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
    assert [other.name for other in EVENTS].count(kind.name) == 1
    for field in fields_of(kind):
        assert field.metadata["help"], field.name
        assert field.default is None or not field.metadata["omitted"], field.name


def test_all_events_are_listed() -> None:
    assert set(EVENTS) == set(Event.__subclasses__())
    assert all(dataclasses.is_dataclass(kind) for kind in EVENTS)
