"""Checks of clients' replies: nothing that a client says is believed before it was checked."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fedsplit.errors import printable
from fedsplit.federation import messages
from fedsplit.federation.messages import (
    ADAPTERS,
    CLIENT_LOST,
    CONTROL,
    EXAMPLES,
    LATE,
    METRIC,
    Failure,
    Reply,
)
from fedsplit.federation.workload import Workload
from fedsplit.scores import Score
from fedsplit.settings.choices import PARTS
from fedsplit.updates import Adapters, ClientUpdate, Layer, RefusedUpdate

LARGEST_CHANGE = 1e4
"""Norm of the change in one round, over all adapters of a client, above which an update is refused.

Changes in honest runs are below 1e3. With every update that is used, each client must still be able to compute a loss:
between two normalisations a text passes through up to three products B A (two are multiplied with each other, and one
follows), and the next normalisation squares the result, where float32 ends at 3e38. An update of norm 1e6 is finite,
and ends there. Within the bound an update may still spoil the model, as a wrong one may at any size. Robust strategies
such as `normclip` and `median` protect against that.
"""

LARGEST_LOSS = 1e9
"""Mean loss in nats above which a client's report is refused.

A guess at random costs ln(vocabulary), about 12 nats. A prediction that is wrong and certain costs the difference of
its logits, which an update within `LARGEST_CHANGE` may drive far up for honest clients, too. A mean in float64 over
losses up to this bound still shows differences of 1e-6.
"""

LARGEST_SUM = 1e15
"""Bound of the sum and of the count of a user's metric, which keeps sums over all clients finite and exact."""

LEAST_COUNT = 1e-9
"""Smallest count of a user's metric beside 0, which keeps the mean finite."""

LARGEST_MEMORY = 2**50
"""Resident memory in bytes above which a client's report is refused: a million gigabytes."""

LARGEST_COUNT = 2**53
"""Number of parameters above which an introduction is refused; a float holds every whole number up to it."""

LONGEST_NAME = 4096
"""Most characters in the name of a client."""

LONGEST_KIND = 100
LONGEST_REASON = 2000
"""Most characters of the kind and of the reason of a failure that a client reports."""

LONGEST_INTRODUCTION = 2**24
"""Most characters in an introduction; the layers of a model with 100 blocks take some 10**5."""

Control = Literal["none", "required", "optional"]
"""Whether an update has tensors beside the adapters: "required" under a control variate, "optional" under a stage."""

KEPT_METRICS = ("client", EXAMPLES, "tokens", "loss", "sample-nats", "sample-tokens", "peak-memory")
"""Metrics of a client's training that are kept until the end of the round, the same for every client."""


@dataclasses.dataclass(frozen=True)
class Introduction:
    """A client's introduction, read and checked.

    Attributes:
        client: Number of the client, as the client says it: the only source there is for it.
        name: Owner of the client's data.
        parameters: Counts of parameters by part: {"bottom": {"total": …, "trainable": …}, "top": …}.
        start: Adapters that training starts from, by part; empty but for the first client.
    """

    client: int
    name: str
    parameters: Mapping[str, Any]
    start: Mapping[str, Adapters]


def about_of(introduced: Introduction) -> str:
    """Returns an introduction as the JSON that `read_introduction` reads, but for its tensors."""
    about: dict[str, Any] = {
        "client": introduced.client,
        "name": introduced.name,
        "parameters": introduced.parameters,
    }
    for part, adapters in introduced.start.items():
        about[part] = {layer: dataclasses.asdict(facts) for layer, facts in adapters.layers.items()}
    return json.dumps(about)


def introduce(introduced: Introduction) -> Reply:
    """Makes a client's reply to `fedsplit.federation.messages.Introduce`."""
    return messages.introduction(introduced.client, about_of(introduced), introduced.start)


def read_introduction(reply: Reply) -> Introduction:
    """Reads a client's introduction.

    Raises:
        RefusedUpdate: The reply is no introduction.
    """
    sender = "a client" if reply.client < 0 else f"client {reply.client}"
    try:
        if reply.malformed:
            raise ValueError(reply.malformed)
        introduced = _parsed(reply)
        if reply.client not in (-1, introduced.client):
            raise ValueError(f"it says that it is client {introduced.client}")
        return introduced
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RefusedUpdate) as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedUpdate(f"{sender} introduced itself in a wrong form: {type(error).__name__}: {reason}") from error


def _parsed(reply: Reply) -> Introduction:
    """Returns the introduction that a reply holds.

    Raises:
        Several: The reply is no introduction, or a value of it is not possible.
    """
    if len(reply.about) > LONGEST_INTRODUCTION:
        raise ValueError(f"it has {len(reply.about)} characters, more than {LONGEST_INTRODUCTION}")
    about = json.loads(reply.about)
    if not isinstance(about, dict):
        raise TypeError("it is no object")
    start = {part: _start_of(part, about.pop(part), tensors) for part, tensors in reply.tensors.items()}
    if about.keys() != {"client", "name", "parameters"}:
        raise ValueError(f"it has {', '.join(map(str, sorted(about)))[:80]}, not client, name and parameters")

    client, name = about["client"], about["name"]
    if type(client) is not int or not 0 <= client < LARGEST_COUNT:
        raise TypeError("its client is no number")
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
        raise TypeError(f"its name is no text of 1 to {LONGEST_NAME} characters")
    return Introduction(client, printable(name), _counts_of(about["parameters"]), start)


def _counts_of(parameters: Any) -> Mapping[str, Mapping[str, int]]:
    """Returns counts of parameters by part.

    Raises:
        TypeError: They are none.
    """
    if not isinstance(parameters, dict) or not parameters.keys() <= {*PARTS}:
        raise TypeError("its parameters are not counted by part")
    for counts in parameters.values():
        if not isinstance(counts, dict) or counts.keys() != {"total", "trainable"}:
            raise TypeError("its parameters are not counted as total and trainable")
        if not all(type(count) is int and 0 <= count < LARGEST_COUNT for count in counts.values()):
            raise TypeError("its counts of parameters are no numbers from 0")
    return parameters


def _start_of(part: str, layers: Any, tensors: Mapping[str, Tensor]) -> Adapters:
    """Returns the adapters that a part starts from.

    Raises:
        ValueError, TypeError, RefusedUpdate: They are none.
    """
    if part not in PARTS:
        raise ValueError(f"there is no part {part[:40]!r}")
    named = {name: _layer_of(name, facts) for name, facts in layers.items()}
    adapters = Adapters(dict(tensors), named)
    adapters.check_fits(adapters.tensors, f"its {part}")
    _check_types(adapters.tensors, dict.fromkeys(tensors, torch.float32), f"its {part}")
    for layer in [*adapters.complete, *adapters.stacked]:
        a, b = adapters.factors(layer)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % named[layer].experts:
            raise ValueError(f"the factors of {layer} do not fit each other")
    return adapters


def _layer_of(name: str, facts: Any) -> Layer:
    """Returns the constants of a layer.

    Raises:
        TypeError: They are none.
    """
    layer = Layer(**facts)
    is_number = type(layer.alpha) in (int, float) and math.isfinite(layer.alpha)
    is_count = type(layer.experts) is int and 0 < layer.experts < LARGEST_COUNT
    are_switches = type(layer.transposed) is bool and type(layer.rslora) is bool
    if not (is_number and is_count and are_switches and isinstance(layer.parameter, str)):
        raise TypeError(f"the constants of {name[:80]} have other types")
    return layer


def reported_failure(client: int, kind: str, reason: str) -> Failure:
    """Returns a failure that a client reports itself.

    Whether a client's process was lost, or is late, the engine knows and not the client: each would have the round
    played again. The reason is cut to a line.
    """
    is_possible = kind.isidentifier() and kind not in (CLIENT_LOST, LATE)
    believed = kind[:LONGEST_KIND] if is_possible else "Failed"  # without a kind it would seem to be the engine's
    return Failure(client, believed, printable(reason)[:LONGEST_REASON])


def to_update(
    reply: Reply,
    given: Adapters,
    trained: Collection[str],
    sender: str,
    workload: Workload,
    control: Control = "none",
) -> ClientUpdate:
    """Turns a client's reply into an update.

    Args:
        reply: Reply to a request to train.
        given: Adapters that the client started from, without the personal ones.
        trained: Names of the tensors that the client had to send.
        sender: Number and name of the client, for messages.
        workload: Bounds of the counts that the client may report.
        control: Whether the client had to send a control variate, or might send tensors of the strategy's stage.

    Raises:
        RefusedUpdate: Names, shapes, types, values or counts are not possible.
    """
    expected = given.with_tensors({name: tensor for name, tensor in given.tensors.items() if name in trained})
    tensors = _sent_tensors(reply, ADAPTERS, sender)
    _check_groups(reply, control if trained else "none", sender)
    types = {name: tensor.dtype for name, tensor in expected.tensors.items()}
    expected.check_fits(tensors, sender)
    _check_types(tensors, types, sender)
    _check_size([tensor - given.tensors[name] for name, tensor in tensors.items()], "adapters that changed", sender)

    sent_control: Mapping[str, Tensor] = {}
    if CONTROL in reply.tensors:
        sent_control = _sent_tensors(reply, CONTROL, sender)
        expected.check_fits(sent_control, f"{sender}, as its control variate,")
        _check_types(sent_control, types, f"{sender}, as its control variate,")
        _check_size(sent_control.values(), "a control variate that changed", sender)

    report = _Report(reply, sender)
    report.check_client(reply.client)
    examples = report.count(EXAMPLES, "its number of examples")
    if examples != workload.examples:
        raise RefusedUpdate(f"{sender} sent {_shown(examples)} as its number of examples, not {workload.examples}")
    report.check_sample(workload)
    report.check_memory()
    router_loss = report.amount("router-loss") if workload.routers else None
    if router_loss is None and "router-loss" in reply.metrics:
        raise RefusedUpdate(f"{sender} sent a router-loss, and the model has no routers that are balanced")
    return ClientUpdate(
        client=reply.client,
        adapters=given.with_tensors({**given.tensors, **tensors}),
        examples=examples,
        tokens=report.count("tokens", least=1, most=workload.tokens),
        loss=report.amount("loss"),
        given=given,
        control=sent_control,
        router_loss=router_loss,
    )


def to_score(reply: Reply, sender: str, workload: Workload, metrics: Collection[str] = ()) -> Score:
    """Turns a client's reply into its score on its held-out text.

    Args:
        reply: Reply to a request to evaluate.
        sender: Number and name of the client, for messages.
        workload: Bounds of the counts that the client may report.
        metrics: Names of the metrics that the client was asked for.

    Raises:
        RefusedUpdate: The score is not possible: no tokens, more than the client has, too large a loss, or a metric
            that is missing or not finite.
    """
    report = _Report(reply, sender)
    report.check_client(reply.client)
    tokens = report.count(EXAMPLES, "its number of tokens", most=workload.held_out)
    right = report.count("right")
    if not tokens or right > tokens:
        raise RefusedUpdate(f"{sender} measured {tokens} tokens, {_shown(right)} of them predicted rightly")
    report.check_sample(workload)
    report.check_memory()
    sums = {name: report.sum_and_count(name) for name in metrics}
    return Score(report.amount("nats", most=LARGEST_LOSS * tokens), tokens, right, sums)


def sample_of(reply: Reply) -> Score:
    """Returns a client's score on its sample, from a reply that was checked.

    A client measures the sample after its own steps, and again at the end of the round.
    """
    return Score(float(reply.metrics["sample-nats"]), int(reply.metrics["sample-tokens"]))


def memory_of(reply: Reply) -> int:
    """Returns the largest resident memory of a client's process in bytes, from a reply that was checked."""
    return int(reply.metrics["peak-memory"])


def without_tensors(reply: Reply) -> Reply:
    """Returns a reply with the metrics that every reply has, and nothing else.

    Tensors would otherwise be held to the end of the round, beside those of the update. Metrics that a single client
    adds must reach no strategy: Flower's own refuse to average replies with different names.
    """
    metrics = {name: reply.metrics[name] for name in KEPT_METRICS if name in reply.metrics}
    return dataclasses.replace(reply, metrics=metrics, tensors={})


def _sent_tensors(reply: Reply, group: str, sender: str) -> Mapping[str, Tensor]:
    """Returns one group of a reply's tensors.

    Raises:
        RefusedUpdate: The group is missing, or its tensors could not be read.
    """
    if reply.malformed:
        raise RefusedUpdate(f"{sender} sent what cannot be used: {reply.malformed}")
    if group not in reply.tensors:
        raise RefusedUpdate(f"{sender} sent no {group}")
    return reply.tensors[group]


def _check_groups(reply: Reply, control: Control, sender: str) -> None:
    """Makes sure that a reply has all groups of tensors that were asked for, and no others.

    Raises:
        RefusedUpdate: It has not.
    """
    if control == "required" and CONTROL not in reply.tensors:
        raise RefusedUpdate(f"{sender} sent no {CONTROL} variate, which the strategy asks for")
    asked = {ADAPTERS} if control == "none" else {ADAPTERS, CONTROL}
    if more := sorted(reply.tensors.keys() - asked):
        raise RefusedUpdate(f"{sender} sent tensors that nobody asked for: {more[0][:80]}")


def _check_types(tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype], sender: str) -> None:
    """Makes sure that tensors have their types: a cast would round, and others compute in the wider type.

    Raises:
        RefusedUpdate: One has another type.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != types[name]:
            raise RefusedUpdate(f"{sender} sent {name} as {tensor.dtype}, not as {types[name]}")


def _check_size(changes: Iterable[Tensor], what: str, sender: str) -> None:
    """Makes sure that a client's change is small enough for others to compute with.

    Args:
        changes: Tensors that the norm is taken over.
        what: Noun and verb for the message.
        sender: Number and name of the client, for the message.

    Raises:
        RefusedUpdate: The norm is above `LARGEST_CHANGE`.
    """
    norm = math.hypot(*(float(torch.linalg.vector_norm(change)) for change in changes))
    if norm > LARGEST_CHANGE:
        raise RefusedUpdate(f"{sender} sent {what} by a norm of {norm:.3g}, not by up to {LARGEST_CHANGE:.0e}")


class _Report:
    """The metrics of a reply, each checked as it is read."""

    def __init__(self, reply: Reply, sender: str) -> None:
        self._metrics = reply.metrics
        self._sender = sender

    def check_client(self, client: int) -> None:
        """Makes sure that a client does not claim to be another one.

        Raises:
            RefusedUpdate: The client does.
        """
        claimed = self._metrics.get("client")
        if type(claimed) is not int or claimed != client:
            raise RefusedUpdate(f"{self._sender} says that it is client {_shown(claimed)}")

    def check_memory(self) -> None:
        """Makes sure that the memory of the client's process is possible.

        Raises:
            RefusedUpdate: It is missing or out of range.
        """
        self.count("peak-memory", most=LARGEST_MEMORY)

    def check_sample(self, workload: Workload) -> None:
        """Makes sure that a score on the client's sample is possible.

        Raises:
            RefusedUpdate: A number is missing or out of range.
        """
        tokens = self.count("sample-tokens", most=workload.sample)
        self.amount("sample-nats", most=LARGEST_LOSS * tokens)

    def count(self, name: str, noun: str = "", least: int = 0, most: int | None = None) -> int:
        """Returns a whole number.

        Args:
            name: Name of the metric.
            noun: Words for the metric in a message, where its name does not say it.
            least: Smallest number that is possible.
            most: Largest number that is possible; None: there is no bound.

        Raises:
            RefusedUpdate: The metric is missing, no whole number or out of range.
        """
        value = self._metrics.get(name)
        if type(value) is not int or value < least or (most is not None and value > most):
            bounds = f"from {least}" if most is None else f"from {least} to {most}"
            reason = f"{_shown(value)} as {noun or f'its {name}'}, not a whole number {bounds}"
            raise RefusedUpdate(f"{self._sender} sent {reason}")
        return value

    def amount(self, name: str, most: float = LARGEST_LOSS) -> float:
        """Returns a number from 0 to `most`, such as a loss.

        Raises:
            RefusedUpdate: The metric is missing, no number or out of range.
        """
        value: Any = self._metrics.get(name)
        if type(value) not in (int, float) or not 0 <= value <= most:
            raise RefusedUpdate(f"{self._sender} sent {_shown(value)} as its {name}, not a number from 0 to {most:g}")
        return float(value)

    def sum_and_count(self, metric: str) -> tuple[float, float]:
        """Returns the sum and the count of a metric.

        Raises:
            RefusedUpdate: They are missing, or no two numbers of a possible size; nothing of nothing sums up to 0.
        """
        value: Any = self._metrics.get(f"{METRIC}{metric}")
        numbers = list(value) if isinstance(value, list) else []
        usable = len(numbers) == 2 and all(type(n) in (int, float) and abs(n) <= LARGEST_SUM for n in numbers)
        if not usable or not (numbers[1] >= LEAST_COUNT or numbers == [0, 0]):
            sent = " and ".join(map(_shown, numbers[:2])) or _shown(value)
            raise RefusedUpdate(f"{self._sender} sent {sent} as its metric {metric}, not a sum and a count")
        return float(numbers[0]), float(numbers[1])


def _shown(value: object) -> str:
    """Returns a value for a message: a single number as it is, nothing of a list."""
    if value is None:
        return "nothing"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    return f"{value}" if isinstance(value, int | float) else f"a {type(value).__name__}"
