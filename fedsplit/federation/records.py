"""Our messages as Flower's records, and back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedsplit.federation.messages import (
    ADAPTERS,
    CLIENT_LOST,
    CONTROL,
    EXAMPLES,
    Answer,
    Briefing,
    Evaluate,
    Failure,
    Introduce,
    Reply,
    Request,
    Train,
)
from fedsplit.federation.replies import reported_failure
from fedsplit.lowrank import LowRank
from fedsplit.tensor_files import pack_changes, unpack_changes
from fedsplit.updates import RefusedUpdate, Task

CONFIG, METRICS = "config", "metrics"
"""Names under which Flower's own strategies expect the records; that of the arrays is `ADAPTERS`."""

TASK, FOLD, FAILURE, SETTINGS = "task", "fold", "failure", "settings"
"""Names of our own records: the strategy's terms, changes of base weights, a failure's kind and reason, and the
settings of one of Flower's strategies for the mods."""

PROXIMAL = "proximal-mu"
"""Setting under which Flower's FedProx sends mu."""

ROUND = "server-round"
"""Setting under which Flower's own strategies send the round."""

WEIGHT = EXAMPLES
"""Metric that Flower's own strategies weight by."""

_KINDS: Mapping[type[Request], str] = {
    Introduce: MessageType.QUERY,
    Train: MessageType.TRAIN,
    Evaluate: MessageType.EVALUATE,
}


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Returns tensors as arrays of the same names."""
    arrays = {name: Array(np.asarray(tensor.numpy())) for name, tensor in tensors.items()}
    return ArrayRecord(arrays)


def from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """Returns arrays as float32 tensors. Some strategies of Flower return float64.

    Raises:
        RefusedUpdate: An array cannot be read, or does not hold floating-point numbers. Integers are not cast.
    """
    tensors = {}
    with np.errstate(over="ignore"):  # a value too large for float32 becomes infinite
        for name, array in record.items():
            tensors[name] = torch.from_numpy(np.array(_numbers(name, array), np.float32))
    return tensors


def _as_sent(record: ArrayRecord) -> dict[str, Tensor]:
    """Returns arrays as tensors of their types, which are checked where they are used.

    Raises:
        RefusedUpdate: An array cannot be read, and holds neither floating-point numbers nor the bytes of an encoded
            tensor; or torch has no such type.
    """
    tensors = {}
    for name, array in record.items():
        values = _numbers(name, array, kinds="fu" if array.dtype == "uint8" else "f")
        try:
            tensors[name] = torch.from_numpy(np.array(values, order="C"))
        except (TypeError, ValueError) as error:
            raise RefusedUpdate(f"{name} is of type {values.dtype}, which no client sends") from error
    return tensors


def _numbers(name: str, array: Array, kinds: str = "f") -> np.ndarray:
    """Returns the values of an array.

    Args:
        name: Name of the array, for messages.
        array: The array.
        kinds: numpy's letters for the allowed kinds of types: "f" for floating-point numbers.

    Raises:
        RefusedUpdate: The values cannot be read, or are of another kind.
    """
    try:
        values = array.numpy()
    except Exception as error:  # numpy raises many kinds for bytes that are no array
        raise RefusedUpdate(f"{name} is no array ({type(error).__name__})") from error
    if values.dtype.kind not in kinds:  # numpy's other kinds are integers, objects, texts, …
        raise RefusedUpdate(f"{name} is of type {values.dtype}, not of numbers with a fraction")
    return values


def array_bytes(content: RecordDict) -> int:
    """Returns the bytes of all arrays of a message, as serialised."""
    total = 0
    for record in content.array_records.values():
        total += sum(len(array.data) for array in record.values())
    return total


def to_message(request: Request, node: int) -> Message:
    """Returns a request as Flower's message to a node."""
    config: dict[str, Any] = {
        **dataclasses.asdict(request.briefing),
        "client": request.client,
        "attempt": request.attempt,
        "accepted": request.accepted,
        "folded": request.folded,
        "folds": request.folds,
        "discarded": request.discarded,
        ROUND: request.round,
    }
    if isinstance(request, Introduce):
        config["wants_start"] = request.wants_start
    content: dict[str, Any] = {CONFIG: ConfigRecord(config)}
    if isinstance(request, Train):
        content[ADAPTERS] = to_arrays(request.tensors)
        content[TASK] = _task_record(request)
        if request.task.settings:
            content[SETTINGS] = ConfigRecord(dict(request.task.settings))
        if request.task.control is not None:
            content[CONTROL] = to_arrays(request.task.control)
    elif isinstance(request, Evaluate):
        content[ADAPTERS] = to_arrays(request.tensors)
        if request.changes:
            content[FOLD] = to_arrays(pack_changes(request.changes))
    return Message(RecordDict(content), dst_node_id=node, message_type=_KINDS[type(request)])


def to_request(message: Message, client: int) -> Request:
    """Returns the request that a message carries.

    Args:
        message: A message from `to_message`.
        client: Number of the client at this node: its partition.
    """
    config: dict[str, Any] = dict(message.content.config_records[CONFIG])
    facts = [fact.name for fact in dataclasses.fields(Briefing)]
    briefing = Briefing(**{name: config[name] for name in facts})
    names = ("attempt", "accepted", "folded", "folds", "discarded")
    fields: dict[str, Any] = {name: config[name] for name in names}
    fields |= {"briefing": briefing, "client": client, "round": config[ROUND]}
    kind = message.metadata.message_type
    if kind == MessageType.TRAIN:
        tensors = _as_sent(message.content.array_records[ADAPTERS])  # numbers, or bytes of `--adapter.codec`
        return Train(**fields, tensors=tensors, **_task_fields(message))
    if kind == MessageType.EVALUATE:
        return Evaluate(**fields, tensors=_tensors(message, ADAPTERS), changes=_changes(message))
    return Introduce(**fields, wants_start=config["wants_start"])


def _tensors(message: Message, group: str) -> dict[str, Tensor]:
    return from_arrays(message.content.array_records[group])


def _changes(message: Message) -> dict[str, LowRank]:
    if FOLD not in message.content.array_records:
        return {}
    return unpack_changes(_tensors(message, FOLD))


def _task_record(request: Train) -> ConfigRecord:
    """Returns the strategy's terms; the control variate itself travels as arrays."""
    task = request.task
    return ConfigRecord(
        {
            "trains": "".join(sorted(task.trains)),  # Flower's records have no sets
            "proximal": task.proximal,
            "tail": task.tail,
            "decay": task.decay,
            "controlled": task.control is not None,
            "drawn": -1 if request.drawn is None else request.drawn,  # Flower's records have no None
            "rank": request.rank,
            "kept": list(request.kept),
        }
    )


def _task_fields(message: Message) -> dict[str, Any]:
    """Returns the fields of `Train` from the record that `_task_record` made."""
    terms: dict[str, Any] = dict(message.content.config_records[TASK])
    control = _tensors(message, CONTROL) if terms["controlled"] else None
    settings: Any = dict(message.content.config_records.get(SETTINGS, {}))
    task = Task(
        frozenset(terms["trains"]),
        terms["proximal"],
        control,
        terms["tail"],
        terms["decay"],
        settings,
    )
    drawn = None if terms["drawn"] < 0 else terms["drawn"]
    return {
        "task": task,
        "drawn": drawn,
        "rank": terms["rank"],
        "kept": tuple(terms["kept"]),
    }


def to_content(answer: Answer) -> RecordDict:
    """Returns a client's answer as the content of Flower's message."""
    if isinstance(answer, Failure):
        return RecordDict({FAILURE: ConfigRecord({"kind": answer.kind, "reason": answer.reason})})
    content: dict[str, Any] = {}
    for group, tensors in answer.tensors.items():
        content[group] = to_arrays(tensors)
    if answer.metrics:
        content[METRICS] = MetricRecord(dict(answer.metrics))
    if answer.about:
        content[CONFIG] = ConfigRecord({"about": answer.about})
    return RecordDict(content)


def to_answer(message: Message, client: int) -> Answer:
    """Returns the answer that a message carries; of a message without one, what Flower says of it.

    Args:
        message: Reply from a node.
        client: Number of the client at that node.
    """
    if message.has_error():  # from the engine, not from the client: the kind can be believed
        # Both mean that the process is gone. An error of the client's own code comes as a failure in the content.
        is_lost = message.error.code in (ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED)
        return Failure(client, CLIENT_LOST if is_lost else "", message.error.reason or "")
    content = message.content
    if FAILURE in content.config_records:
        failure = content.config_records[FAILURE]
        kind = str(failure.get("kind", ""))
        reason = str(failure.get("reason", ""))
        return reported_failure(client, kind, reason)
    about = ""
    if CONFIG in content.config_records:
        about = str(content.config_records[CONFIG].get("about", ""))
    metrics = dict(content.metric_records.get(METRICS, {}))
    tensors: dict[str, dict[str, Tensor]] = {}
    malformed = ""  # a reply that cannot be read counts as an answer, and is refused where its round is checked
    try:
        for group, record in content.array_records.items():
            tensors[group] = _as_sent(record)
    except RefusedUpdate as refused:
        malformed = str(refused)
    return Reply(client, metrics, tensors, about, malformed, array_bytes(content))


@contextlib.contextmanager
def named_run() -> Iterator[None]:
    """Lets Flower's messages be made where no engine of Flower's has named the run yet."""
    names = ("_run_id", "_node_id", "_task_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    for name, value in before.items():
        setattr(TaskIdentity, name, 1 if value is None else value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)
