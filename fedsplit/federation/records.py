"""Between our types and Flower's records."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsplit.lowrank import LowRank
from fedsplit.model.store import pack_changes, unpack_changes
from fedsplit.scores import Score
from fedsplit.updates import Adapters, ClientUpdate, Layer, RefusedUpdate, Task

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
"""The names Flower's own strategies expect the records under."""

TASK, CONTROL, FOLD = "task", "control", "fold"
"""The names of our own: what the strategy asks, control variates, and what is folded into base weights."""

PROXIMAL = "proximal-mu"
"""The setting under which Flower's FedProx sends mu."""

ROUND = "server-round"
"""The setting under which Flower's own strategies send the round."""

WEIGHT = "num-examples"
"""The metric Flower's own strategies weight by."""


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Adapters to arrays of the same names."""
    return ArrayRecord({name: Array(np.asarray(tensor.numpy())) for name, tensor in tensors.items()})


def from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """Arrays to float32 tensors; some of Flower's strategies return float64."""
    return {name: torch.from_numpy(np.array(array.numpy(), np.float32)) for name, array in record.items()}


def nbytes(content: RecordDict) -> int:
    """Bytes of all arrays of a message, as serialised."""
    return sum(array_bytes(record) for record in content.array_records.values())


def array_bytes(record: ArrayRecord | None) -> int:
    """Bytes of all arrays of a record, as serialised; none of none."""
    return sum(len(array.data) for array in record.values()) if record else 0


def message_to(node: int, kind: str, content: RecordDict) -> Message:
    """A message to a node; `kind` is one of `flwr.app.MessageType`."""
    return Message(content, dst_node_id=node, message_type=kind)


def tensors_of(message: Message) -> dict[str, Tensor]:
    """The adapters that a message carries."""
    return from_arrays(message.content.array_records[ARRAYS])


def config_of(message: Message) -> dict[str, Any]:
    """The instructions that a message carries."""
    return dict(message.content.config_records[CONFIG])


def instructions(facts: Mapping[str, str | int], round: int) -> ConfigRecord:
    """What a client must know in every message: `facts`, which are the same in all of a run, and the round.

    The facts are "run" (its configuration, as JSON), "trunk" (its name), "incarnation", "threads", "store" (the
    folder of the clients' disks) and "personal" (the factors that stay with their clients, such as "B").
    """
    return ConfigRecord({**facts, ROUND: round})


def to_task(task: Task, drawn: int | None, rank: int) -> ConfigRecord:
    """What the strategy asks of a client; the control variate itself travels as arrays."""
    return ConfigRecord(
        {
            "trains": "".join(sorted(task.trains)),
            "proximal": task.proximal,
            "tail": task.tail,
            "decay": task.decay,
            "controlled": task.control is not None,
            "drawn": -1 if drawn is None else drawn,
            "rank": rank,
        }
    )


def read_task(message: Message) -> tuple[Task, int | None, int]:
    """The inverse of `to_task`: the task with its control variate, the draw, the rank."""
    asked = dict(message.content.config_records[TASK])
    control = from_arrays(message.content.array_records[CONTROL]) if asked["controlled"] else None
    task = Task(
        frozenset(str(asked["trains"])),
        float(asked["proximal"]),  # type: ignore[arg-type]  # we wrote it
        control,
        float(asked["tail"]),  # type: ignore[arg-type]
        float(asked["decay"]),  # type: ignore[arg-type]
    )
    drawn, rank = int(asked["drawn"]), int(asked["rank"])  # type: ignore[arg-type]
    return task, None if drawn < 0 else drawn, rank


def to_fold(changes: Mapping[str, LowRank]) -> ArrayRecord:
    """Changes of base weights by layer, as their factors."""
    return to_arrays(pack_changes(changes))


def read_fold(message: Message) -> dict[str, LowRank]:
    """The changes of base weights that a message carries; none, where it has no such record."""
    if FOLD not in message.content.array_records:
        return {}
    return unpack_changes(from_arrays(message.content.array_records[FOLD]))


def from_update(update: ClientUpdate, shared: Collection[str], own: Score, peak_memory: int) -> RecordDict:
    """What a client sends back after training.

    Args:
        update: What came of it.
        shared: The names of the adapters that go up.
        own: What it measured right after its own steps.
        peak_memory: Of its process, in bytes.
    """
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "client": update.client,
        WEIGHT: update.examples,
        "tokens": update.tokens,
        "loss": update.loss,
        "sample-nats": own.nats,
        "sample-tokens": own.tokens,
        "peak-memory": peak_memory,
    }
    if update.router_loss is not None:
        metrics["router-loss"] = update.router_loss
    sent = {name: tensor for name, tensor in update.adapters.tensors.items() if name in shared}
    found: dict[str, Any] = {ARRAYS: to_arrays(sent), METRICS: MetricRecord(metrics)}
    if control := {name: tensor for name, tensor in update.control.items() if name in shared}:
        found[CONTROL] = to_arrays(control)
    return RecordDict(found)


def to_update(reply: Message, given: Adapters, trained: Collection[str], sender: str) -> ClientUpdate:
    """What a client sent, checked against what it was given.

    Args:
        reply: Its answer.
        given: What it started from, without what is personal.
        trained: The names that it had to send.
        sender: Who it is, for the message.

    Raises:
        RefusedUpdate: Names, shapes or values are not what they must be.
    """
    tensors, metrics = tensors_of(reply), metrics_of(reply)
    expected = given.with_tensors({name: tensor for name, tensor in given.tensors.items() if name in trained})
    expected.check_fits(tensors, sender)
    control: dict[str, Tensor] = {}
    if CONTROL in reply.content.array_records:
        control = from_arrays(reply.content.array_records[CONTROL])
        expected.check_fits(control, f"{sender}, as its control variate,")
    examples = metrics[WEIGHT]
    if not examples >= 0:
        raise RefusedUpdate(f"{sender} sent {examples} as its number of examples")
    return ClientUpdate(
        client=int(metrics["client"]),
        adapters=given.with_tensors({**given.tensors, **tensors}),
        examples=int(examples),
        tokens=int(metrics["tokens"]),
        loss=float(metrics["loss"]),
        given=given,
        control=control,
        router_loss=metrics.get("router-loss"),
    )


def drop_arrays(message: Message) -> None:
    """Takes the arrays out of a message, and leaves the rest."""
    message.content = RecordDict({**message.content.metric_records, **message.content.config_records})


def metrics_of(reply: Message) -> dict[str, Any]:
    """The metrics of a reply as plain numbers."""
    return dict(reply.content.metric_records[METRICS])


def from_held_out(client: int, measured: Score, part: Score, peak_memory: int) -> RecordDict:
    """What a client sends back after evaluation; `part` is of the text that it measures after its own steps, too."""
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "client": client,
        WEIGHT: measured.tokens,
        "loss": measured.loss,
        "nats": measured.nats,
        "right": measured.right,
        "sample-nats": part.nats,
        "sample-tokens": part.tokens,
        "peak-memory": peak_memory,
    }
    return RecordDict({METRICS: MetricRecord(metrics)})


def to_held_out(reply: Message) -> Score:
    """What a client measured."""
    metrics = metrics_of(reply)
    return Score(float(metrics["nats"]), int(metrics[WEIGHT]), int(metrics["right"]))


def sample_of(reply: Message) -> Score:
    """What a client measured on its sample: after its own steps, or at the end of the round."""
    metrics = metrics_of(reply)
    return Score(float(metrics["sample-nats"]), int(metrics["sample-tokens"]))


def introduction(
    client: int, name: str, start: Mapping[str, Adapters] | None, parameters: Mapping[str, Any]
) -> RecordDict:
    """How a client presents itself.

    Args:
        client: Its partition.
        name: Whose data it has.
        start: The adapters of bottom and top that training starts from, where it is the one to tell.
        parameters: Counts of both parts.
    """
    about: dict[str, Any] = {"client": client, "name": name, "parameters": parameters}
    found: dict[str, Any] = {}
    for part, adapters in (start or {}).items():
        about[part] = {layer: dataclasses.asdict(facts) for layer, facts in adapters.layers.items()}
        found[part] = to_arrays(adapters.tensors)
    return RecordDict({**found, CONFIG: ConfigRecord({"about": json.dumps(about)})})


def read_introduction(reply: Message) -> tuple[dict[str, Any], dict[str, Adapters]]:
    """The inverse of `introduction`: client, name and parameters; and the adapters by part, where sent."""
    about: dict[str, Any] = json.loads(config_of(reply)["about"])
    start = {}
    for part, record in reply.content.array_records.items():
        layers = {name: Layer(**facts) for name, facts in about.pop(part).items()}
        start[part] = Adapters(from_arrays(record), layers)
    return about, start
