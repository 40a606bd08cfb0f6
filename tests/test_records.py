"""Between our types and Flower's: nothing is lost, and what does not fit is refused."""

from __future__ import annotations

import math

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedsplit import records
from fedsplit.evaluate import HeldOut
from fedsplit.updates import Adapters, ClientUpdate, Layer, RefusedUpdate

ADAPTERS = Adapters(
    {"l.lora_A.weight": torch.randn(2, 3), "l.lora_B.weight": torch.randn(4, 2)}, {"l": Layer(2.0, True)}
)


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
    back = records.to_update(reply(records.from_update(update, HeldOut(2.5, 3), peak_memory=7)), ADAPTERS, "ann")
    assert (back.client, back.examples, back.tokens, back.loss) == (3, 40, 5120, 3.25)
    assert back.adapters.layers == ADAPTERS.layers


def test_bytes_are_those_of_the_serialised_arrays() -> None:
    content = records.from_update(ClientUpdate(0, ADAPTERS, 1), HeldOut(0.0, 0), 0)
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
        records.to_update(reply(records.from_update(update, HeldOut(0.0, 0), 0)), ADAPTERS, "ann")


def test_measurements_come_back() -> None:
    answer = reply(records.from_held_out(2, HeldOut(12.5, 5), HeldOut(4.5, 2), 0))
    assert records.to_held_out(answer) == HeldOut(12.5, 5)
    assert records.sample_of(answer) == HeldOut(4.5, 2)
    after_own_steps = reply(records.from_update(ClientUpdate(0, ADAPTERS, 1), HeldOut(2.5, 3), 0))
    assert records.sample_of(after_own_steps) == HeldOut(2.5, 3)


def test_a_message_can_be_narrowed_to_some_arrays() -> None:
    content = records.from_update(ClientUpdate(0, ADAPTERS, 1), HeldOut(0.0, 0), 0)
    narrowed = records.only(content, {"l.lora_A.weight"})
    assert list(narrowed.array_records[records.ARRAYS]) == ["l.lora_A.weight"]
    assert narrowed.metric_records == content.metric_records
    assert len(content.array_records[records.ARRAYS]) == 2


def test_introductions_come_back() -> None:
    about, adapters = records.read_introduction(
        reply(records.introduction(4, "Ann", ADAPTERS, {"bottom": {"total": 1}}))
    )
    assert about == {"client": 4, "name": "Ann", "parameters": {"bottom": {"total": 1}}}
    assert adapters is not None
    assert adapters.layers == ADAPTERS.layers
    assert records.read_introduction(reply(records.introduction(4, "Ann", None, {})))[1] is None
