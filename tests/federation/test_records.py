"""Between our types and Flower's: nothing is lost, and what does not fit is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedsplit.federation import records
from fedsplit.lowrank import LowRank
from fedsplit.scores import Score
from fedsplit.updates import Adapters, ClientUpdate, Layer, RefusedUpdate, Task

ADAPTERS = Adapters(
    {"l.lora_A.weight": torch.randn(2, 3), "l.lora_B.weight": torch.randn(4, 2)}, {"l": Layer(2.0, True)}
)


NAMES = set(ADAPTERS.tensors)


def reply(content: RecordDict) -> Message:
    return records.message_to(1, "train", content)


def test_adapters_come_back_to_the_bit() -> None:
    back = records.from_arrays(records.to_arrays(ADAPTERS.tensors))
    assert list(back) == list(ADAPTERS.tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in ADAPTERS.tensors.items())


def test_float64_of_a_flower_strategy_becomes_float32() -> None:
    record = ArrayRecord({"x": Array(torch.ones(2, dtype=torch.float64).numpy())})
    assert records.from_arrays(record)["x"].dtype == torch.float32


def test_updates_come_back() -> None:
    update = ClientUpdate(3, ADAPTERS, examples=40, tokens=5120, loss=3.25)
    sent = reply(records.from_update(update, NAMES, Score(2.5, 3), peak_memory=7))
    back = records.to_update(sent, ADAPTERS, NAMES, 3, "ann")
    assert (back.client, back.examples, back.tokens, back.loss) == (3, 40, 5120, 3.25)
    assert back.adapters.layers == ADAPTERS.layers
    assert back.given is ADAPTERS


def test_only_what_is_shared_goes_up_and_the_rest_is_what_was_given() -> None:
    """Half of the factors, half of the bytes; with a control variate it is twice that."""
    trained = ADAPTERS.with_tensors({n: t + 1 for n, t in ADAPTERS.tensors.items()})
    control = {name: 2 * tensor for name, tensor in ADAPTERS.tensors.items()}
    update = ClientUpdate(0, trained, 1, control=control)
    content = records.from_update(update, {"l.lora_B.weight"}, Score(0.0, 0), 0)
    assert [list(record) for record in content.array_records.values()] == [["l.lora_B.weight"]] * 2
    back = records.to_update(reply(content), ADAPTERS, {"l.lora_B.weight"}, 0, "ann")
    assert torch.equal(back.adapters.tensors["l.lora_A.weight"], ADAPTERS.tensors["l.lora_A.weight"])
    assert torch.equal(back.adapters.tensors["l.lora_B.weight"], trained.tensors["l.lora_B.weight"])
    assert list(back.control) == ["l.lora_B.weight"]
    with pytest.raises(RefusedUpdate, match="ann sent other layers"):
        records.to_update(reply(content), ADAPTERS, NAMES, 0, "ann")


@pytest.mark.parametrize(
    ("task", "drawn"),
    [
        (Task(), None),
        (Task(frozenset("B"), 0.5, None, 0.9, 0.1), 2**62 + 1),
        (Task(control={"l.lora_A.weight": torch.ones(2, 3)}), 0),
    ],
)
def test_tasks_come_back(task: Task, drawn: int | None) -> None:
    content = {records.TASK: records.to_task(task, drawn, 4)}
    if task.control is not None:
        content[records.CONTROL] = records.to_arrays(task.control)
    back, *others = records.read_task(reply(RecordDict(content)))
    assert others == [drawn, 4]
    assert (back.trains, back.proximal, back.tail, back.decay) == (task.trains, task.proximal, task.tail, task.decay)
    assert (back.control is None) == (task.control is None)
    assert task.control is None or torch.equal(back.control["l.lora_A.weight"], torch.ones(2, 3))


def test_what_is_folded_comes_back() -> None:
    change = LowRank(torch.randn(4, 2), torch.randn(2, 3))
    back = records.read_fold(reply(RecordDict({records.FOLD: records.to_fold({"l": change})})))
    assert list(back) == ["l"]
    assert torch.equal(back["l"].up, change.up) and torch.equal(back["l"].down, change.down)
    assert records.read_fold(reply(RecordDict())) == {}


def test_bytes_are_those_of_the_serialised_arrays() -> None:
    content = records.from_update(ClientUpdate(0, ADAPTERS, 1), NAMES, Score(0.0, 0), 0)
    assert ADAPTERS.nbytes <= records.nbytes(content) <= ADAPTERS.nbytes + 2 * 256


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (
            ClientUpdate(0, ADAPTERS.with_tensors({n: t * math.nan for n, t in ADAPTERS.tensors.items()}), 1),
            "ann sent NaN",
        ),
        (ClientUpdate(0, ADAPTERS.with_tensors({}), 1), "ann sent other layers"),
        (ClientUpdate(0, ADAPTERS, -5), "ann sent -5 as its number of examples"),
    ],
)
def test_updates_that_do_not_fit_are_refused_by_name(update: ClientUpdate, message: str) -> None:
    with pytest.raises(RefusedUpdate, match=message):
        records.to_update(reply(records.from_update(update, NAMES, Score(0.0, 0), 0)), ADAPTERS, NAMES, 0, "ann")


def test_measurements_come_back() -> None:
    answer = reply(records.from_held_out(2, Score(12.5, 5), Score(4.5, 2), 0))
    assert records.to_held_out(answer, 2, "ann") == Score(12.5, 5)
    assert records.sample_of(answer, "ann") == Score(4.5, 2)
    after_own_steps = reply(records.from_update(ClientUpdate(0, ADAPTERS, 1), NAMES, Score(2.5, 3), 0))
    assert records.sample_of(after_own_steps, "ann") == Score(2.5, 3)


def test_introductions_come_back() -> None:
    about, start = records.read_introduction(
        reply(records.introduction(4, "Ann", {"top": ADAPTERS}, {"bottom": {"total": 1}}))
    )
    assert about == {"client": 4, "name": "Ann", "parameters": {"bottom": {"total": 1}}}
    assert list(start) == ["top"]
    assert start["top"].layers == ADAPTERS.layers
    assert records.read_introduction(reply(records.introduction(4, "Ann", None, {})))[1] == {}


def told(**metrics: object) -> Message:
    """A reply to a training message whose metrics say something else."""
    sent = reply(records.from_update(ClientUpdate(3, ADAPTERS, 8, 64, 2.5), NAMES, Score(2.5, 3), 7))
    known = dict(sent.content.metric_records[records.METRICS])
    changed = {name: value for name, value in {**known, **metrics}.items() if value is not None}
    sent.content[records.METRICS] = MetricRecord(changed)
    return sent


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"num-examples": math.inf}, "sent inf as its number of examples, not a whole number"),
        ({"num-examples": 9}, "sent 9 as its number of examples, not 8"),
        ({"num-examples": 8.0}, "sent 8.0 as its number of examples"),
        ({"client": 99}, "says that it is client 99"),
        ({"client": None}, "says that it is client nothing"),
        ({"client": [3]}, "says that it is client a list"),
        ({"loss": None}, "sent nothing as its loss"),
        ({"loss": [1.0]}, "sent a list as its loss"),
        ({"loss": -1.0}, "sent -1.0 as its loss"),
        ({"loss": math.nan}, "sent nan as its loss"),
        ({"tokens": -1}, "sent -1 as its tokens"),
        ({"sample-nats": math.inf}, "sent inf as its sample-nats"),
        ({"sample-tokens": None}, "sent nothing as its sample-tokens"),
        ({"peak-memory": math.inf}, "sent inf as its peak-memory"),
        ({"router-loss": [0.0]}, "sent a list as its router-loss"),
    ],
    ids=str,
)
def test_what_a_client_says_of_itself_is_not_believed(metrics: dict[str, object], words: str) -> None:
    assert records.to_update(told(), ADAPTERS, NAMES, 3, "ann", 8).examples == 8
    with pytest.raises(RefusedUpdate, match=f"ann {words}"):
        records.to_update(told(**metrics), ADAPTERS, NAMES, 3, "ann", 8)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (Array(np.ones((2, 3), np.int64)), "l.lora_A.weight is of type int64, not of numbers with a fraction"),
        (Array("float32", (2, 3), "numpy.ndarray", b"no array"), "l.lora_A.weight is no array"),
        (Array(np.full((2, 3), 1e300)), "sent NaN or infinite values in l.lora_A.weight"),
    ],
    ids=["integers", "garbage", "too large"],
)
def test_arrays_are_looked_at_before_they_are_cast(array: Array, words: str) -> None:
    sent = told()
    sent.content.array_records[records.ARRAYS]["l.lora_A.weight"] = array
    with pytest.raises(RefusedUpdate, match=words):
        records.to_update(sent, ADAPTERS, NAMES, 3, "ann")
    sent.content = RecordDict()
    with pytest.raises(RefusedUpdate, match="ann sent no arrays"):
        records.to_update(sent, ADAPTERS, NAMES, 3, "ann")


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"num-examples": 0}, "measured 0 tokens"),
        ({"num-examples": 1, "right": 2}, "measured 1 tokens, 2 of them predicted rightly"),
        ({"nats": math.nan}, "sent nan as its nats"),
        ({"nats": -1.0}, "sent -1.0 as its nats"),
        ({"client": 1}, "says that it is client 1"),
        ({"sample-tokens": 0.5}, "sent 0.5 as its sample-tokens"),
    ],
    ids=str,
)
def test_a_measurement_that_cannot_be_is_refused(metrics: dict[str, object], words: str) -> None:
    answer = reply(records.from_held_out(2, Score(12.5, 5), Score(4.5, 2), 0))
    known = dict(answer.content.metric_records[records.METRICS])
    answer.content[records.METRICS] = MetricRecord({**known, **metrics})
    with pytest.raises(RefusedUpdate, match=f"ann {words}"):
        records.to_held_out(answer, 2, "ann")


def test_no_strategy_sees_metrics_that_others_do_not_send() -> None:
    """Flower's own refuse to aggregate replies of different names: one client would end the run of all."""
    sent = told(**{"a name of its own": 1.0, "router-loss": 0.5})
    sent.content["more"] = MetricRecord({"x": 1})
    records.keep_metrics(sent)
    plain = told()
    records.keep_metrics(plain)
    assert sent.content == plain.content and list(sent.content) == [records.METRICS]


def test_an_introduction_in_a_wrong_form_is_refused() -> None:
    sent = reply(records.introduction(4, "Ann", {"top": ADAPTERS}, {}))
    for about in ("{", "[]", json.dumps({"client": [4], "parameters": {}, "top": {}}), json.dumps({"client": 4})):
        sent.content[records.CONFIG] = ConfigRecord({"about": about})
        with pytest.raises(RefusedUpdate, match="introduced itself in a wrong form"):
            records.read_introduction(sent)
