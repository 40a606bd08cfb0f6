"""A call from Python is divided into settings and objects, and its errors are collected."""

from __future__ import annotations

from typing import Any

import pytest

from fedsplit.call import Arguments, Call, listed, read_call
from fedsplit.objects import NOTHING
from fedsplit.settings.config import Config
from strategies.fedavg import FedAvg


class Sink:
    """Takes events, and does nothing with them."""

    def handle(self, event: object) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def fit(logits: Any, labels: Any) -> Any:
    return logits, labels


def read(config: Any = None, settings: dict[str, Any] | None = None, **named: Any) -> Call:
    arguments = {"strategy": None, "dataset": None, "model": None, "tokenizer": None, "objective": None}
    arguments |= {"metrics": [], "sinks": [], **named}
    return read_call(config, Arguments(**arguments), settings or {})


def test_names_become_settings_and_leave_no_object() -> None:
    call = read(strategy="fedprox", dataset="synthetic", model="gpt2", metrics=["m:f"], sinks=["m:Sink"])
    config = call.draft.config
    assert (config.strategy, config.dataset, config.model) == ("fedprox", "synthetic", "gpt2")
    assert (config.metric, config.sinks) == (("m:f",), ("m:Sink",))
    assert call.draft.errors == () and call.objects == NOTHING
    assert (call.model, call.dataset, call.sinks) == (None, None, [])


def test_objects_stay_objects_and_leave_the_settings_at_their_defaults() -> None:
    strategy, model, dataset, sink = FedAvg(), object(), {"ann": ["a text"], "bob": ["another"]}, Sink()
    call = read(strategy=strategy, model=model, dataset=dataset, sinks=[sink, "m:Sink"])
    assert call.objects.strategy is strategy and call.model is model and call.dataset is dataset
    assert call.sinks == [sink] and call.draft.config.sinks == ("m:Sink",)
    assert (call.draft.config.strategy, call.draft.config.model) == (Config.strategy, Config.model)
    assert call.draft.config.clients == 2  # a client for each list of texts


def test_functions_have_a_name_among_the_settings_that_no_other_process_finds() -> None:
    call = read(objective=fit, metrics=[fit], settings={"engine": "local"})
    name = f"{__name__}:fit(...)"
    assert (call.draft.config.objective, call.draft.config.metric) == (name, (name,))
    assert call.objects.objective is fit and call.objects.metrics == {name: fit}
    assert call.draft.errors == ()


def test_a_model_and_its_tokenizer_are_a_pair() -> None:
    model, tokenizer = object(), object()
    assert read(model=model, tokenizer=tokenizer).model == (model, tokenizer)


@pytest.mark.parametrize(
    ("named", "settings", "messages"),
    [
        ({"model": "gpt2", "tokenizer": object()}, {}, ["tokenizer: one of object"]),
        ({"sinks": [object()], "metrics": [3]}, {"rounds": 0}, ["sinks: an object", "metrics: an object", "rounds: 0"]),
        ({"objective": fit}, {"engine": "ray"}, ["objective: an object of type function"]),
    ],
)
def test_all_errors_are_collected(named: dict[str, Any], settings: dict[str, Any], messages: list[str]) -> None:
    errors = [str(error) for error in read(settings=settings, **named).draft.errors]
    assert len(errors) == len(messages)
    assert all(error.startswith(message) for error, message in zip(errors, messages, strict=True)), errors


def test_a_call_that_sets_nothing_else_is_known_to_hold_defaults() -> None:
    assert read(settings={"rounds": 0}).draft.is_default
    assert not read(settings={"rounds": 0, "clients": 3}).draft.is_default
    assert not read(settings={"rounds": 0}, strategy=FedAvg()).draft.is_default


def test_a_single_value_is_a_list_of_one() -> None:
    assert listed("rouge") == ["rouge"] and listed(fit) == [fit] and listed(iter(["a", "b"])) == ["a", "b"]
