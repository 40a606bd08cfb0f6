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

from fedsplit.evaluate import HeldOut
from fedsplit.updates import Adapters, ClientUpdate, Layer, RefusedUpdate

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
"""The names Flower's own strategies expect the records under."""

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
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def message_to(node: int, kind: str, content: RecordDict) -> Message:
    """A message to a node; `kind` is one of `flwr.app.MessageType`."""
    return Message(content, dst_node_id=node, message_type=kind)


def tensors_of(message: Message) -> dict[str, Tensor]:
    """The adapters that a message carries."""
    return from_arrays(message.content.array_records[ARRAYS])


def config_of(message: Message) -> dict[str, Any]:
    """The instructions that a message carries."""
    return dict(message.content.config_records[CONFIG])


def instructions(run: str, trunk: str, incarnation: str, threads: int, round: int) -> ConfigRecord:
    """What a client must know: the run's configuration (as JSON), the trunk, its threads, the round."""
    return ConfigRecord({"run": run, "trunk": trunk, "incarnation": incarnation, "threads": threads, ROUND: round})


def from_update(update: ClientUpdate, own: HeldOut, peak_memory: int) -> RecordDict:
    """What a client sends back after training; `own` is what it measured right after its own steps."""
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "client": update.client,
        WEIGHT: update.examples,
        "tokens": update.tokens,
        "loss": update.loss,
        "sample-nats": own.nats,
        "sample-tokens": own.tokens,
        "peak-memory": peak_memory,
    }
    return RecordDict({ARRAYS: to_arrays(update.adapters.tensors), METRICS: MetricRecord(metrics)})


def to_update(reply: Message, adapters: Adapters, sender: str) -> ClientUpdate:
    """What a client sent, checked against what it was given.

    Raises:
        RefusedUpdate: Names, shapes or values are not what they must be.
    """
    tensors, metrics = tensors_of(reply), metrics_of(reply)
    adapters.check_fits(tensors, sender)
    examples = metrics[WEIGHT]
    if not examples >= 0:
        raise RefusedUpdate(f"{sender} sent {examples} as its number of examples")
    return ClientUpdate(
        client=int(metrics["client"]),
        adapters=adapters.with_tensors(tensors),
        examples=int(examples),
        tokens=int(metrics["tokens"]),
        loss=float(metrics["loss"]),
    )


def metrics_of(reply: Message) -> dict[str, Any]:
    """The metrics of a reply as plain numbers."""
    return dict(reply.content.metric_records[METRICS])


def from_held_out(client: int, measured: HeldOut, part: HeldOut, peak_memory: int) -> RecordDict:
    """What a client sends back after evaluation; `part` is of the text that it measures after its own steps, too."""
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "client": client,
        WEIGHT: measured.tokens,
        "loss": measured.loss,
        "nats": measured.nats,
        "sample-nats": part.nats,
        "sample-tokens": part.tokens,
        "peak-memory": peak_memory,
    }
    return RecordDict({METRICS: MetricRecord(metrics)})


def to_held_out(reply: Message) -> HeldOut:
    """What a client measured."""
    metrics = metrics_of(reply)
    return HeldOut(float(metrics["nats"]), int(metrics[WEIGHT]))


def sample_of(reply: Message) -> HeldOut:
    """What a client measured on its sample: after its own steps, or at the end of the round."""
    metrics = metrics_of(reply)
    return HeldOut(float(metrics["sample-nats"]), int(metrics["sample-tokens"]))


def only(content: RecordDict, names: Collection[str]) -> RecordDict:
    """A message's content with no other arrays than those."""
    arrays = ArrayRecord({name: array for name, array in content.array_records[ARRAYS].items() if name in names})
    return RecordDict({**content, ARRAYS: arrays})


def introduction(client: int, name: str, adapters: Adapters | None, parameters: Mapping[str, Any]) -> RecordDict:
    """How a client presents itself: its partition and, where asked, the adapters that training starts from."""
    about: dict[str, Any] = {"client": client, "name": name, "parameters": parameters}
    records: dict[str, Any] = {}
    if adapters is not None:
        about["layers"] = {layer: dataclasses.asdict(facts) for layer, facts in adapters.layers.items()}
        records[ARRAYS] = to_arrays(adapters.tensors)
    return RecordDict({**records, CONFIG: ConfigRecord({"about": json.dumps(about)})})


def read_introduction(reply: Message) -> tuple[dict[str, Any], Adapters | None]:
    """The inverse of `introduction`: client, name and parameters; and the adapters, where sent."""
    about: dict[str, Any] = json.loads(config_of(reply)["about"])
    if "layers" not in about:
        return about, None
    layers = {name: Layer(**facts) for name, facts in about.pop("layers").items()}
    return about, Adapters(tensors_of(reply), layers)
