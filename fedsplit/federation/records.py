"""Between our types and Flower's records."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsplit.federation.workload import Workload
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

LARGEST_CHANGE = 1e4
"""Norm of the change in one round, over all adapters of a client, above which an update is refused.

Changes in honest runs are below 1e3. With what is admitted, every client must still be able to compute a loss: between
two normalisations a text passes through up to three products B A (two that are multiplied with each other, and one
after them), and the next normalisation squares the result, where float32 ends at 3e38. An update of norm 1e6 is finite,
and ends there. Within the bound an update may still spoil the model, as a wrong one may at any size; against that
there are robust strategies, such as `normclip` and `median`.
"""

LARGEST_LOSS = 1e9
"""Mean loss in nats above which a client's report is refused.

A guess at random costs ln(vocabulary), about 12 nats; a wrong and certain one as much as its logits are apart, which
an update within `LARGEST_CHANGE` may drive far up for honest clients, too. A mean in float64 over losses up to this
bound still tells differences of 1e-6.
"""


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Adapters to arrays of the same names."""
    return ArrayRecord({name: Array(np.asarray(tensor.numpy())) for name, tensor in tensors.items()})


def from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """Arrays to float32 tensors; some of Flower's strategies return float64.

    Raises:
        RefusedUpdate: An array cannot be read, or is not of floating-point numbers: such a one is not cast.
    """
    return {name: torch.from_numpy(_floats(name, array)) for name, array in record.items()}


def _floats(name: str, array: Array) -> np.ndarray:
    try:
        values = array.numpy()
    except Exception as error:  # numpy raises many kinds for bytes that are no array
        raise RefusedUpdate(f"{name} is no array ({type(error).__name__})") from error
    if values.dtype.kind != "f":
        raise RefusedUpdate(f"{name} is of type {values.dtype}, not of numbers with a fraction")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused by name
        return np.array(values, np.float32)


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


def to_update(
    reply: Message, given: Adapters, trained: Collection[str], client: int, sender: str, workload: Workload
) -> ClientUpdate:
    """Turns a client's answer into an update, after checks against what it was given and what the server knows of it.

    Args:
        reply: The client's answer.
        given: Adapters that the client started from, without the personal ones.
        trained: Names of the tensors that it had to send.
        client: Its number, by the node that the answer is from.
        sender: Its number and name, for messages.
        workload: Bounds of the counts that it may report.

    Raises:
        RefusedUpdate: Names, shapes, values or counts are not possible.
    """
    expected = given.with_tensors({name: tensor for name, tensor in given.tensors.items() if name in trained})
    tensors = _sent_tensors(reply, ARRAYS, sender)
    expected.check_fits(tensors, sender)
    _check_size([tensor - given.tensors[name] for name, tensor in tensors.items()], "adapters that changed", sender)

    control: dict[str, Tensor] = {}
    if CONTROL in reply.content.array_records:
        control = _sent_tensors(reply, CONTROL, sender)
        expected.check_fits(control, f"{sender}, as its control variate,")
        _check_size(control.values(), "a control variate that changed", sender)

    said = _Said(reply, sender)
    said.check_client(client)
    examples = said.count(WEIGHT, "its number of examples")
    if examples != workload.examples:
        raise RefusedUpdate(f"{sender} sent {examples} as its number of examples, not {workload.examples}")
    said.check_sample(workload)
    said.count("peak-memory")
    return ClientUpdate(
        client=client,
        adapters=given.with_tensors({**given.tensors, **tensors}),
        examples=examples,
        tokens=said.count("tokens", least=1, most=workload.tokens),
        loss=said.amount("loss"),
        given=given,
        control=control,
        router_loss=said.amount("router-loss") if "router-loss" in said.metrics else None,
    )


def _check_size(changes: Iterable[Tensor], what: str, sender: str) -> None:
    """Makes sure that a client's change is small enough for others to compute with.

    Args:
        changes: Tensors that the norm is taken over.
        what: Noun and verb for the message.
        sender: The client's number and name, for the message.

    Raises:
        RefusedUpdate: The norm is above `LARGEST_CHANGE`.
    """
    norm = math.hypot(*(float(torch.linalg.vector_norm(change)) for change in changes))
    if norm > LARGEST_CHANGE:
        raise RefusedUpdate(f"{sender} sent {what} by a norm of {norm:.3g}, not by up to {LARGEST_CHANGE:.0e}")


def _sent_tensors(reply: Message, record: str, sender: str) -> dict[str, Tensor]:
    """The tensors of one record of a reply.

    Raises:
        RefusedUpdate: It is not there, or holds something else.
    """
    if record not in reply.content.array_records:
        raise RefusedUpdate(f"{sender} sent no {record}")
    try:
        return from_arrays(reply.content.array_records[record])
    except RefusedUpdate as refused:
        raise RefusedUpdate(f"{sender} sent what cannot be used: {refused}") from refused


class _Said:
    """The numbers that a client says of itself, none of which is believed before it is looked at."""

    def __init__(self, reply: Message, sender: str) -> None:
        """Takes the metrics of a reply; none where it has no such record."""
        self._sender = sender
        self.metrics: dict[str, Any] = dict(reply.content.metric_records.get(METRICS, {}))

    def check_client(self, client: int) -> None:
        """Makes sure that a client does not say that it is another one.

        Raises:
            RefusedUpdate: It does.
        """
        if (claimed := self.metrics.get("client")) != client:
            raise RefusedUpdate(f"{self._sender} says that it is client {_shown(claimed)}")

    def check_sample(self, workload: Workload) -> None:
        """Makes sure that a measurement on the client's sample is possible.

        Raises:
            RefusedUpdate: A number is missing or out of range.
        """
        tokens = self.count("sample-tokens", most=workload.sample)
        self.amount("sample-nats", most=LARGEST_LOSS * tokens)

    def count(self, name: str, what: str = "", least: int = 0, most: int | None = None) -> int:
        """Returns a whole number.

        Args:
            name: Name of the metric.
            what: The same for a message, where the name does not say it.
            least: The smallest number that is possible.
            most: The largest number that is possible; None: there is no bound.

        Raises:
            RefusedUpdate: It is missing, no whole number or out of range.
        """
        value = self.metrics.get(name)
        if type(value) is not int or value < least or (most is not None and value > most):
            bounds = f"from {least}" if most is None else f"from {least} to {most}"
            words = f"{_shown(value)} as {what or f'its {name}'}, not a whole number {bounds}"
            raise RefusedUpdate(f"{self._sender} sent {words}")
        return value

    def amount(self, name: str, most: float = LARGEST_LOSS) -> float:
        """Returns a number from 0 to `most`, such as a loss.

        Raises:
            RefusedUpdate: It is missing, no number or out of range.
        """
        value: Any = self.metrics.get(name)
        if type(value) not in (int, float) or not 0 <= value <= most:
            raise RefusedUpdate(f"{self._sender} sent {_shown(value)} as its {name}, not a number from 0 to {most:g}")
        return float(value)

    def sum_and_count(self, metric: str) -> tuple[float, float]:
        """Returns the sum and the count of a metric.

        Raises:
            RefusedUpdate: They are missing, or no two finite numbers, the second of 0 or more.
        """
        value: Any = self.metrics.get(f"{_METRIC}{metric}")
        numbers = list(value) if isinstance(value, list) else []
        usable = len(numbers) == 2 and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
        if not usable or numbers[1] < 0:
            sent = f"{numbers}" if numbers else _shown(value)
            raise RefusedUpdate(f"{self._sender} sent {sent} as its metric {metric}, not a sum and a count")
        return float(numbers[0]), float(numbers[1])


def _shown(value: object) -> str:
    """Returns a value for a message: a single number as it is, nothing of a list."""
    if value is None:
        return "nothing"
    return f"{value}" if isinstance(value, int | float) else f"a {type(value).__name__}"


_KEPT = ("client", WEIGHT, "tokens", "loss", "sample-nats", "sample-tokens", "peak-memory")
"""The metrics of a client's training that are kept until the round's end, the same of every client."""


def keep_metrics(message: Message) -> None:
    """Takes all out of a client's reply but the metrics that every reply has, so that no strategy sees others."""
    metrics: Mapping[str, Any] = message.content.metric_records.get(METRICS, {})
    message.content = RecordDict({METRICS: MetricRecord({name: metrics[name] for name in _KEPT if name in metrics})})


def metrics_of(reply: Message) -> dict[str, Any]:
    """The metrics of a reply as plain numbers."""
    return dict(reply.content.metric_records[METRICS])


_METRIC = "metric."
"""Begins the names under which the sum and the count of a metric travel."""


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
        **{f"{_METRIC}{name}": [total, count] for name, (total, count) in measured.metrics.items()},
    }
    return RecordDict({METRICS: MetricRecord(metrics)})


def to_held_out(reply: Message, client: int, sender: str, workload: Workload, metrics: Collection[str] = ()) -> Score:
    """Returns a client's measurement on its held-out text, after checks against what the server knows of it.

    Args:
        reply: The client's answer.
        client: Its number, by the node that the answer is from.
        sender: Its number and name, for messages.
        workload: Bounds of the counts that it may report.
        metrics: Names of the metrics that it was asked for.

    Raises:
        RefusedUpdate: The measurement is not possible: no tokens, more than the client has, too large a loss, or a
            metric that is missing or not finite.
    """
    said = _Said(reply, sender)
    said.check_client(client)
    tokens = said.count(WEIGHT, "its number of tokens", most=workload.held_out)
    right = said.count("right")
    if not tokens or right > tokens:
        raise RefusedUpdate(f"{sender} measured {tokens} tokens, {right} of them predicted rightly")
    said.check_sample(workload)
    said.count("peak-memory")
    sums = {name: said.sum_and_count(name) for name in metrics}
    return Score(said.amount("nats", most=LARGEST_LOSS * tokens), tokens, right, sums)


def sample_of(reply: Message) -> Score:
    """Returns a client's measurement on its sample, from a reply that has been checked.

    A client measures it after its own steps, and again at the end of the round.
    """
    metrics = metrics_of(reply)
    return Score(float(metrics["sample-nats"]), int(metrics["sample-tokens"]))


def memory_of(reply: Message) -> int:
    """The most memory that a client's process has had, in bytes, of a reply that has been checked."""
    return int(metrics_of(reply)["peak-memory"])


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
    """The inverse of `introduction`: client, name and parameters; and the adapters by part, where sent.

    Raises:
        RefusedUpdate: It is no introduction.
    """
    try:
        about: dict[str, Any] = json.loads(config_of(reply)["about"])
        start = {}
        for part, record in reply.content.array_records.items():
            layers = {name: Layer(**facts) for name, facts in about.pop(part).items()}
            start[part] = Adapters(from_arrays(record), layers)
        if type(about["client"]) is not int or not isinstance(about["parameters"], dict):
            raise TypeError("its client is no number, or its parameters are not counted")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RefusedUpdate(f"a client introduced itself in a wrong form: {type(error).__name__}: {error}") from error
    return about, start
