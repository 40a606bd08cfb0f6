"""Between our types and Flower's: nothing is lost, and what does not fit is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedsplit.federation import records
from fedsplit.federation.workload import Workload
from fedsplit.lowrank import LowRank
from fedsplit.scores import Score
from fedsplit.updates import Adapters, ClientUpdate, Layer, RefusedUpdate, Task

ADAPTERS = Adapters(
    {"l.lora_A.weight": torch.randn(2, 3), "l.lora_B.weight": torch.randn(4, 2)}, {"l": Layer(2.0, True)}
)


NAMES = set(ADAPTERS.tensors)


def work(examples: int = 1) -> Workload:
    return Workload(examples, tokens=128 * examples, held_out=20, sample=4)


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
    back = records.to_update(sent, ADAPTERS, NAMES, 3, "ann", work(40))
    assert (back.client, back.examples, back.tokens, back.loss) == (3, 40, 5120, 3.25)
    assert back.adapters.layers == ADAPTERS.layers
    assert back.given is ADAPTERS


def test_only_what_is_shared_goes_up_and_the_rest_is_what_was_given() -> None:
    """Half of the factors, half of the bytes; with a control variate it is twice that."""
    trained = ADAPTERS.with_tensors({n: t + 1 for n, t in ADAPTERS.tensors.items()})
    control = {name: 2 * tensor for name, tensor in ADAPTERS.tensors.items()}
    update = ClientUpdate(0, trained, 1, 16, control=control)
    content = records.from_update(update, {"l.lora_B.weight"}, Score(0.0, 0), 0)
    assert [list(record) for record in content.array_records.values()] == [["l.lora_B.weight"]] * 2
    back = records.to_update(reply(content), ADAPTERS, {"l.lora_B.weight"}, 0, "ann", work())
    assert torch.equal(back.adapters.tensors["l.lora_A.weight"], ADAPTERS.tensors["l.lora_A.weight"])
    assert torch.equal(back.adapters.tensors["l.lora_B.weight"], trained.tensors["l.lora_B.weight"])
    assert list(back.control) == ["l.lora_B.weight"]
    with pytest.raises(RefusedUpdate, match="ann sent other layers"):
        records.to_update(reply(content), ADAPTERS, NAMES, 0, "ann", work())


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
    sent = reply(records.from_update(update, NAMES, Score(0.0, 0), 0))
    with pytest.raises(RefusedUpdate, match=message):
        records.to_update(sent, ADAPTERS, NAMES, 0, "ann", work())


def changed_by(norm: float) -> dict[str, torch.Tensor]:
    """Both factors, changed by one value each, so that the norm over both is as said."""
    moved = {name: tensor.clone() for name, tensor in ADAPTERS.tensors.items()}
    for tensor in moved.values():
        tensor[0, 0] += norm / math.sqrt(2)
    return moved


@pytest.mark.parametrize("norm", [1.01 * records.LARGEST_CHANGE, 1e30])
def test_what_others_cannot_compute_with_is_refused_by_name(norm: float) -> None:
    """By the change from what was given, over all tensors; of adapters, and of a control variate."""
    large = ADAPTERS.with_tensors({name: tensor + 1e7 for name, tensor in ADAPTERS.tensors.items()})
    update = ClientUpdate(0, ADAPTERS.with_tensors(changed_by(0.99 * records.LARGEST_CHANGE)), 1, 16)
    fits = reply(records.from_update(update, NAMES, Score(), 0))
    assert records.to_update(fits, ADAPTERS, NAMES, 0, "ann", work()).examples == 1
    with pytest.raises(RefusedUpdate, match=r"^ann sent adapters that changed by a norm of .*, not by up to 1e\+04$"):
        records.to_update(fits, large, NAMES, 0, "ann", work())
    for kind in ("adapters", "a control variate"):
        adapters = changed_by(norm) if kind == "adapters" else ADAPTERS.tensors
        control = {} if kind == "adapters" else changed_by(norm)
        spoilt = ClientUpdate(0, ADAPTERS.with_tensors(adapters), 1, 16, control=control)
        sent = reply(records.from_update(spoilt, NAMES, Score(), 0))
        with pytest.raises(RefusedUpdate, match=rf"^ann sent {kind} that changed by a norm of "):
            records.to_update(sent, ADAPTERS, NAMES, 0, "ann", work())


def test_measurements_come_back() -> None:
    answer = reply(records.from_held_out(2, Score(12.5, 5), Score(4.5, 2), 0))
    assert records.to_held_out(answer, 2, "ann", work()) == Score(12.5, 5)
    assert records.sample_of(answer) == Score(4.5, 2)
    after_own_steps = reply(records.from_update(ClientUpdate(0, ADAPTERS, 1), NAMES, Score(2.5, 3), 0))
    assert records.sample_of(after_own_steps) == Score(2.5, 3)


def test_metrics_come_back_by_name() -> None:
    score = Score(12.5, 5, metrics={"rouge": (-1.5, 3.0), "length": (4.0, 2.0)})
    answer = reply(records.from_held_out(2, score, Score(4.5, 2), 0))
    assert records.to_held_out(answer, 2, "ann", work(), ["rouge", "length"]) == score
    assert records.to_held_out(answer, 2, "ann", work()).metrics == {}


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (None, "nothing"),
        ([1.0], r"\[1.0\]"),
        ([1.0, 2.0, 3.0], r"\[1.0, 2.0, 3.0\]"),
        ([math.nan, 1.0], r"\[nan, 1.0\]"),
        ([1.0, math.inf], r"\[1.0, inf\]"),
        ([1.0, -1.0], r"\[1.0, -1.0\]"),
        (3.0, "3.0"),
    ],
)
def test_a_metric_that_is_no_sum_and_count_is_refused(sent: object, shown: str) -> None:
    answer = reply(records.from_held_out(2, Score(12.5, 5, metrics={"rouge": (1.0, 2.0)}), Score(4.5, 2), 0))
    del answer.content.metric_records["metrics"]["metric.rouge"]
    if sent is not None:
        answer.content.metric_records["metrics"]["metric.rouge"] = sent
    with pytest.raises(RefusedUpdate, match=f"^ann sent {shown} as its metric rouge, not a sum and a count"):
        records.to_held_out(answer, 2, "ann", work(), ["rouge"])


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
        ({"loss": 1e308}, r"sent 1e\+308 as its loss, not a number from 0 to 1e\+09"),
        ({"tokens": -1}, "sent -1 as its tokens"),
        ({"tokens": 0}, "sent 0 as its tokens, not a whole number from 1 to 1024"),
        ({"tokens": 1025}, "sent 1025 as its tokens, not a whole number from 1 to 1024"),
        ({"num-examples": 10**15}, "sent 1000000000000000 as its number of examples, not 8"),
        ({"sample-nats": math.inf}, "sent inf as its sample-nats"),
        ({"sample-nats": 1e100}, r"sent 1e\+100 as its sample-nats, not a number from 0 to 3e\+09"),
        ({"sample-tokens": 5}, "sent 5 as its sample-tokens, not a whole number from 0 to 4"),
        ({"router-loss": 1e300}, r"sent 1e\+300 as its router-loss"),
        ({"sample-tokens": None}, "sent nothing as its sample-tokens"),
        ({"peak-memory": math.inf}, "sent inf as its peak-memory"),
        ({"router-loss": [0.0]}, "sent a list as its router-loss"),
    ],
    ids=str,
)
def test_what_a_client_says_of_itself_is_not_believed(metrics: dict[str, object], words: str) -> None:
    assert records.to_update(told(tokens=1024), ADAPTERS, NAMES, 3, "ann", work(8)).tokens == 1024
    with pytest.raises(RefusedUpdate, match=f"ann {words}"):
        records.to_update(told(**metrics), ADAPTERS, NAMES, 3, "ann", work(8))


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
        records.to_update(sent, ADAPTERS, NAMES, 3, "ann", work(8))
    sent.content = RecordDict()
    with pytest.raises(RefusedUpdate, match="ann sent no arrays"):
        records.to_update(sent, ADAPTERS, NAMES, 3, "ann", work(8))


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"num-examples": 0}, "measured 0 tokens"),
        ({"num-examples": 21}, "sent 21 as its number of tokens, not a whole number from 0 to 20"),
        ({"num-examples": 10**15, "nats": 0.0}, "sent 1000000000000000 as its number of tokens"),
        ({"nats": 1e300}, r"sent 1e\+300 as its nats, not a number from 0 to 5e\+09"),
        ({"sample-tokens": 5}, "sent 5 as its sample-tokens"),
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
        records.to_held_out(answer, 2, "ann", work())


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
