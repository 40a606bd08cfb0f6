"""Checks of clients' replies: nothing that a client says is believed before it was checked."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsplit.federation import messages
from fedsplit.federation.messages import ADAPTERS, CONTROL, EXAMPLES, METRIC, Reply
from fedsplit.federation.workload import Workload
from fedsplit.scores import Score
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
    if reply.malformed:
        raise RefusedUpdate(f"a client introduced itself in a wrong form: {reply.malformed}")
    try:
        about: dict[str, Any] = json.loads(reply.about)
        start = {}
        for part, tensors in reply.tensors.items():
            layers = {name: Layer(**facts) for name, facts in about.pop(part).items()}
            start[part] = Adapters(dict(tensors), layers)
        if type(about["client"]) is not int or not isinstance(about["parameters"], dict):
            raise TypeError("its client is no number, or its parameters are not counted")
        return Introduction(about["client"], str(about["name"]), about["parameters"], start)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RefusedUpdate(f"a client introduced itself in a wrong form: {type(error).__name__}: {error}") from error


def to_update(reply: Reply, given: Adapters, trained: Collection[str], sender: str, workload: Workload) -> ClientUpdate:
    """Turns a client's reply into an update.

    Args:
        reply: Reply to a request to train.
        given: Adapters that the client started from, without the personal ones.
        trained: Names of the tensors that the client had to send.
        sender: Number and name of the client, for messages.
        workload: Bounds of the counts that the client may report.

    Raises:
        RefusedUpdate: Names, shapes, values or counts are not possible.
    """
    expected = given.with_tensors({name: tensor for name, tensor in given.tensors.items() if name in trained})
    tensors = _sent_tensors(reply, ADAPTERS, sender)
    expected.check_fits(tensors, sender)
    _check_size([tensor - given.tensors[name] for name, tensor in tensors.items()], "adapters that changed", sender)

    control: Mapping[str, Tensor] = {}
    if CONTROL in reply.tensors:
        control = _sent_tensors(reply, CONTROL, sender)
        expected.check_fits(control, f"{sender}, as its control variate,")
        _check_size(control.values(), "a control variate that changed", sender)

    report = _Report(reply, sender)
    report.check_client(reply.client)
    examples = report.count(EXAMPLES, "its number of examples")
    if examples != workload.examples:
        raise RefusedUpdate(f"{sender} sent {examples} as its number of examples, not {workload.examples}")
    report.check_sample(workload)
    report.count("peak-memory")
    return ClientUpdate(
        client=reply.client,
        adapters=given.with_tensors({**given.tensors, **tensors}),
        examples=examples,
        tokens=report.count("tokens", least=1, most=workload.tokens),
        loss=report.amount("loss"),
        given=given,
        control=control,
        router_loss=report.amount("router-loss") if "router-loss" in reply.metrics else None,
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
        raise RefusedUpdate(f"{sender} measured {tokens} tokens, {right} of them predicted rightly")
    report.check_sample(workload)
    report.count("peak-memory")
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
        if claimed != client:
            raise RefusedUpdate(f"{self._sender} says that it is client {_shown(claimed)}")

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
            RefusedUpdate: They are missing, or no two finite numbers, the second of 0 or more.
        """
        value: Any = self._metrics.get(f"{METRIC}{metric}")
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
