"""Our messages as Flower's records, and back: nothing is lost, and arrays are looked at before they are cast."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MessageType, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.federation import records
from fedsplit.federation.introductions import Introduction, introduce, read_introduction
from fedsplit.federation.messages import (
    ADAPTERS,
    CONTROL,
    TRUNK_LOST,
    Answer,
    Briefing,
    Evaluate,
    Failure,
    Introduce,
    Reply,
    Request,
    Train,
    introduction,
    measured,
    trained,
)
from fedsplit.federation.replies import to_update
from fedsplit.federation.workload import Workload
from fedsplit.lowrank import LowRank
from fedsplit.scores import Score
from fedsplit.updates import Adapters, ClientUpdate, Layer, RefusedUpdate, Task

START = Adapters({"l.lora_A.weight": torch.randn(2, 3), "l.lora_B.weight": torch.randn(4, 2)}, {"l": Layer(2.0, True)})
BRIEFING = Briefing(
    run='{"seed": 3}', trunk="t", incarnation="first", threads=2, store="/some/where", personal="B", model="{}"
)
FIELDS: dict[str, Any] = {"round": 3, "attempt": 1, "accepted": 2, "folded": 1, "folds": 1, "discarded": 4}
EDGES = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, float("inf"), float("nan")])
"""Values that a detour over text, or over another type, would not leave as they are."""


def plain(value: object) -> object:
    """Returns a message as something that == compares to the bit, NaN and the sign of zero included."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes())
    if isinstance(value, LowRank):
        return plain({"up": value.up, "down": value.down})
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, Briefing | Request | Reply | Failure | Task):
        return {"type": type(value).__name__, **{name: plain(one) for name, one in vars(value).items()}}
    return value


def over_the_wire(message: Message) -> Message:
    """Returns a message as it is after Flower has sent it from one process to another."""
    return message_from_proto(message_to_proto(message))


def delivered(request: Request, node: int = 7) -> Request:
    message = over_the_wire(records.to_message(request, node))
    assert message.metadata.dst_node_id == node
    return records.to_request(message, request.client)


def answered(answer: Answer) -> Answer:
    question = Message(RecordDict(), dst_node_id=7, message_type=MessageType.TRAIN)
    return records.to_answer(over_the_wire(Message(records.to_content(answer), reply_to=question)), answer.client)


@pytest.mark.parametrize(
    "request_",
    [
        Introduce(BRIEFING, 5),
        Introduce(BRIEFING, 5, wants_start=True),
        Train(BRIEFING, 5, **FIELDS, tensors=dict(START.tensors), rank=4),
        Train(BRIEFING, 5, **FIELDS, tensors={"x": EDGES}, task=Task(frozenset("B"), 0.5, None, 0.9, 0.1)),
        Train(BRIEFING, 0, task=Task(control={"l.lora_A.weight": EDGES}), drawn=0),
        Train(BRIEFING, 0, task=Task(frozenset(), control={}), drawn=2**62 + 1),
        Train(BRIEFING, 0, task=Task(settings={"clipping_norm": 0.1, "names": ["a", "b"], "is": True})),
        Evaluate(BRIEFING, 5, **FIELDS, tensors=dict(START.tensors)),
        Evaluate(BRIEFING, 5, **FIELDS, changes={"l": LowRank(torch.randn(4, 2), torch.randn(2, 3))}),
    ],
    ids=lambda request: type(request).__name__,
)
def test_every_request_comes_back_to_the_bit(request_: Request) -> None:
    assert plain(delivered(request_)) == plain(request_)


@given(
    proximal=st.floats(0, 1e6),
    tail=st.floats(0, 1),
    decay=st.floats(0, 1),
    trains=st.sets(st.sampled_from("AB")),
    drawn=st.none() | st.integers(0, 2**63 - 1),
    rank=st.integers(1, 512),
    has_control=st.booleans(),
)
def test_every_task_comes_back_to_the_bit(
    proximal: float, tail: float, decay: float, trains: set[str], drawn: int | None, rank: int, has_control: bool
) -> None:
    control = {"l.lora_A.weight": EDGES} if has_control else None
    task = Task(frozenset(trains), proximal, control, tail, decay)
    request = Train(BRIEFING, 1, task=task, drawn=drawn, rank=rank)
    assert plain(delivered(request)) == plain(request)


@pytest.mark.parametrize(
    "answer",
    [
        trained(ClientUpdate(3, START, 40, 5120, 3.25, router_loss=0.5), START.tensors, Score(2.5, 3), 7),
        trained(
            ClientUpdate(3, START, 1, control={"l.lora_B.weight": torch.ones(4, 2)}), START.tensors, Score(), 2**40
        ),
        measured(2, Score(1 / 3, 5, 4), Score(4.5, 2), 7),
        introduction(0, '{"client": 0}', {"bottom": START, "top": START}),
        introduction(4, '{"client": 4}', {}),
        Reply(1, tensors={ADAPTERS: {"x": EDGES}}, nbytes=152),
        Failure(3, TRUNK_LOST, "there is no trunk named t"),
        Failure(3, "ValueError", "ValueError: no luck, at all"),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_every_answer_comes_back_to_the_bit(answer: Answer) -> None:
    """Metrics, tensors and bytes of a reply; kind and words of a failure."""
    assert plain(answered(answer)) == plain(answer)


def test_the_kind_of_a_request_is_that_of_flowers_message() -> None:
    kinds = {Introduce: MessageType.QUERY, Train: MessageType.TRAIN, Evaluate: MessageType.EVALUATE}
    for type_, kind in kinds.items():
        assert records.to_message(type_(BRIEFING, 0), 7).metadata.message_type == kind


def test_flowers_own_errors_become_failures() -> None:
    """Their kind is not known, and their words are Flower's."""
    question = Message(RecordDict(), dst_node_id=7, message_type=MessageType.TRAIN)
    failed = Message(Error(1, "<class 'x.Broken'>:<'no luck'>"), reply_to=question)
    assert records.to_answer(failed, 2) == Failure(2, "", "<class 'x.Broken'>:<'no luck'>")
    assert records.to_answer(Message(Error(1), reply_to=question), 2) == Failure(2, "", "")
    assert records.to_answer(Message(RecordDict(), reply_to=question), 2) == Reply(2)


def test_float64_of_a_flower_strategy_becomes_float32() -> None:
    record = ArrayRecord({"x": Array(torch.ones(2, dtype=torch.float64).numpy())})
    assert records.from_arrays(record)["x"].dtype == torch.float32


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (Array(np.ones((2, 3), np.int64)), "l.lora_A.weight is of type int64, not of numbers with a fraction"),
        (Array("float32", (2, 3), "numpy.ndarray", b"no array"), "l.lora_A.weight is no array"),
        (Array(np.full((2, 3), 1e300)), "sent l.lora_A.weight as torch.float64, not as torch.float32"),
        (Array(np.ones((2, 3), np.longdouble)), "l.lora_A.weight is of type float128, which no client sends"),
    ],
    ids=["integers", "garbage", "wide", "wider"],
)
@pytest.mark.parametrize("group", [ADAPTERS, CONTROL])
def test_arrays_are_looked_at_before_they_are_cast(array: Array, words: str, group: str) -> None:
    """A reply that holds such an array arrives, and is refused where it would be used."""
    control = {name: torch.zeros_like(tensor) for name, tensor in START.tensors.items()}
    reply = trained(ClientUpdate(3, START, 8, 64, 2.5, control=control), START.tensors, Score(2.5, 3), 7)
    content = records.to_content(reply)
    content.array_records[group]["l.lora_A.weight"] = array
    question = Message(RecordDict(), dst_node_id=7, message_type=MessageType.TRAIN)
    answer = records.to_answer(Message(content, reply_to=question), 3)
    assert isinstance(answer, Reply)
    with pytest.raises(RefusedUpdate, match=words):
        to_update(answer, START, set(START.tensors), "ann", Workload(8, 1024, 20, 4), "required")


def test_an_introduction_comes_back_over_the_wire() -> None:
    introduced = Introduction(0, "Ann", {"bottom": {"total": 1, "trainable": 1}}, {"bottom": START, "top": START})
    reply = answered(introduce(introduced))
    assert isinstance(reply, Reply)
    back = read_introduction(reply)
    assert (back.client, back.name, back.parameters) == (0, "Ann", {"bottom": {"total": 1, "trainable": 1}})
    assert {part: adapters.layers for part, adapters in back.start.items()} == {
        "bottom": START.layers,
        "top": START.layers,
    }


def test_messages_can_be_made_where_no_run_has_a_name_and_the_names_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("_run_id", "_node_id", "_task_id")
    for name, value in zip(names, (None, 5, None), strict=True):
        monkeypatch.setattr(TaskIdentity, name, value)
    with pytest.raises(KeyError), records.named_run():
        assert records.to_message(Introduce(BRIEFING, 0), 7).metadata.src_node_id == 5
        raise KeyError
    assert [getattr(TaskIdentity, name) for name in names] == [None, 5, None]


@st.composite
def array_bytes_of(draw: st.DrawFn) -> bytes:
    """An array as numpy writes it, in which bytes are changed, left out, doubled or added."""
    written = io.BytesIO()
    np.save(written, np.zeros((2, 3), np.float32))
    mutated = bytearray(written.getvalue())
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(mutated)))
        end = min(len(mutated), place + draw(st.integers(0, 12)))
        mutated[place:end] = draw(st.sampled_from([b"", bytes(mutated[place:end]) * 2]) | st.binary(max_size=12))
    return bytes(mutated)


CLAIMS = st.sampled_from(["(2305843009213693952,)", "(2147483648, 2147483648, 2147483648)", "(-1, 3)", "(2, 3, 'x')"])


def claiming(shape: str, kind: str = "<f4") -> bytes:
    """Returns the bytes of an array whose header claims a shape, with no values behind it."""
    words = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(words).to_bytes(2, "little") + words.encode()


@settings(max_examples=100)
@given(array_bytes_of() | st.binary(max_size=200) | CLAIMS.map(claiming) | st.just(claiming("(3,)", "|O")))
def test_whatever_bytes_an_array_has_the_reply_is_an_update_or_is_refused(data: bytes) -> None:
    """Nothing is unpickled, and no memory is taken for what a header claims."""
    update = ClientUpdate(3, START, examples=8, tokens=64, loss=2.5)
    content = records.to_content(trained(update, START.tensors, Score(2.5, 3), 7))
    content.array_records[ADAPTERS]["l.lora_A.weight"] = Array("float32", (2, 3), "numpy.ndarray", data)
    question = Message(RecordDict(), dst_node_id=7, message_type=MessageType.TRAIN)
    answer = records.to_answer(Message(content, reply_to=question), 3)
    assert isinstance(answer, Reply)
    try:
        found = to_update(answer, START, set(START.tensors), "ann", Workload(8, 1024, 20, 4))
    except RefusedUpdate as refused:
        assert str(refused).startswith("ann sent ") and "\n" not in str(refused) and len(str(refused)) < 300
    else:
        assert all(torch.isfinite(tensor).all() for tensor in found.adapters.tensors.values())
