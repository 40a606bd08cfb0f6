"""Checks of clients' replies. The server uses no value of a client before the value is checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fedsplit.errors import printable
from fedsplit.factors import select
from fedsplit.federation.messages import (
    ADAPTERS,
    CLIENT_LOST,
    CONTROL,
    EXAMPLES,
    LATE,
    METRIC,
    SAMPLE_SECONDS,
    SECONDS,
    Failure,
    Reply,
)
from fedsplit.federation.workload import Workload
from fedsplit.scores import Score
from fedsplit.updates import Adapters, ClientUpdate, RefusedUpdate

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

LARGEST_DURATION = 1e9
"""Seconds above which a client's report is refused: thirty years."""

LONGEST_KIND = 100
LONGEST_REASON = 2000
"""Most characters of the kind and of the reason of a failure that a client reports."""

Control = Literal["none", "required", "optional"]
"""Rule for tensors beside the adapters in an update: "required" under a control variate, "optional" under a stage."""

KEPT_METRICS = (
    *("client", EXAMPLES, "tokens", "loss", "sample-nats", "sample-tokens", "peak-memory"),
    *(SECONDS, SAMPLE_SECONDS),
)
"""Metrics of a client's training that the server keeps until the end of the round; the same for every client."""


NORM_BIT = "norm_bit"
"""Metric of Flower's adaptive clipping: 1 if the client's update was clipped, else 0."""

FOR_STRATEGIES = (*KEPT_METRICS, NORM_BIT)
"""Metrics that Flower's strategies get to see."""


def reported_failure(client: int, kind: str, reason: str) -> Failure:
    """Returns a failure that a client reports, with the reason cut to a line.

    A client may not report that its process was lost or that it is late, since the server would play the round again.
    Only the engine can tell.
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
    tensors = _trained_tensors(reply, given, trained, sender)
    # Without a trained tensor, there is nothing that a control variate could belong to.
    _check_groups(reply, control if trained else "none", sender)
    control_change = _control_change(reply, given, tensors, sender) if CONTROL in reply.tensors else {}

    report = _Report(reply, sender)
    report.check_client(reply.client)
    examples = report.count(EXAMPLES, "its number of examples")
    if examples != workload.examples:
        raise RefusedUpdate(f"{sender} sent {_shown(examples)} as its number of examples, not {workload.examples}")
    report.check_sample(workload)
    report.check_memory()
    report.check_seconds(SECONDS, SAMPLE_SECONDS)
    report.check_norm_bit()
    return ClientUpdate(
        client=reply.client,
        adapters=given.with_tensors({**given.tensors, **tensors}),
        examples=examples,
        tokens=report.count("tokens", least=1, most=workload.tokens),
        loss=report.amount("loss"),
        given=given,
        control=control_change,
        router_loss=report.router_loss(workload),
    )


def _trained_tensors(
    reply: Reply,
    given: Adapters,
    trained: Collection[str],
    sender: str,
) -> Mapping[str, Tensor]:
    """Returns the adapters that a client trained.

    Args:
        reply: Reply to a request to train.
        given: Adapters that the client started from.
        trained: Names of the tensors that the client had to send.
        sender: Number and name of the client, for messages.

    Raises:
        RefusedUpdate: A name, a shape, a type or the size of the change is not possible.
    """
    # Only trained tensors: `check_fits` refuses every further name.
    expected = given.with_tensors(select(given.tensors, trained))
    tensors = _sent_tensors(reply, ADAPTERS, sender)
    # Names and shapes first: the checks that follow look tensors up by name, and subtract them.
    expected.check_fits(tensors, sender)
    check_types(tensors, _types_of(expected), sender)
    changes = [tensor - given.tensors[name] for name, tensor in tensors.items()]
    _check_size(changes, "adapters that changed", sender)
    return tensors


def _control_change(
    reply: Reply,
    given: Adapters,
    trained: Mapping[str, Tensor],
    sender: str,
) -> Mapping[str, Tensor]:
    """Returns the change of a client's control variate, which has a tensor for each trained one.

    Raises:
        RefusedUpdate: A name, a shape, a type or the size of the change is not possible.
    """
    expected = given.with_tensors({name: given.tensors[name] for name in trained})
    tensors = _sent_tensors(reply, CONTROL, sender)
    as_control = f"{sender}, as its control variate,"
    expected.check_fits(tensors, as_control)
    check_types(tensors, _types_of(expected), as_control)
    _check_size(tensors.values(), "a control variate that changed", sender)
    return tensors


def _types_of(adapters: Adapters) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in adapters.tensors.items()}


def to_score(
    reply: Reply,
    sender: str,
    workload: Workload,
    metrics: Collection[str] = (),
) -> Score:
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
    report.check_seconds(SECONDS)
    sums = {name: report.sum_and_count(name) for name in metrics}
    return Score(report.amount("nats", most=LARGEST_LOSS * tokens), tokens, right, sums)


def sample_of(reply: Reply) -> Score:
    """Returns a client's score on its sample, from a checked reply.

    A client measures the sample after its own steps, and again at the end of the round.
    """
    return Score(float(reply.metrics["sample-nats"]), int(reply.metrics["sample-tokens"]))


def memory_of(reply: Reply) -> int:
    """Returns the largest resident memory of a client's process in bytes, from a checked reply."""
    return int(reply.metrics["peak-memory"])


def seconds_of(reply: Reply, metric: str = SECONDS) -> float:
    """Returns the duration of a client's work in seconds, from a checked reply."""
    return float(reply.metrics[metric])


def without_tensors(reply: Reply) -> Reply:
    """Returns a reply without tensors, and with the common metrics only.

    The update holds the tensors until the end of the round, so that a second copy would waste memory. Flower's
    strategies refuse to average replies with different metrics, so that a metric of a single client is dropped.
    """
    metrics = {name: reply.metrics[name] for name in FOR_STRATEGIES if name in reply.metrics}
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
    """Checks that a reply has all requested groups of tensors, and no further group.

    Raises:
        RefusedUpdate: A group is missing, or was not requested.
    """
    if control == "required" and CONTROL not in reply.tensors:
        raise RefusedUpdate(f"{sender} sent no {CONTROL} variate, which the strategy asks for")
    asked = {ADAPTERS} if control == "none" else {ADAPTERS, CONTROL}
    if more := sorted(reply.tensors.keys() - asked):
        raise RefusedUpdate(f"{sender} sent tensors that nobody asked for: {more[0][:80]}")


def check_types(tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype], sender: str) -> None:
    """Checks the types of tensors. A cast would round, and a wider type would change the type of the aggregate.

    Args:
        tensors: Tensors by name.
        types: Expected types by name.
        sender: Number and name of the client, for the message.

    Raises:
        RefusedUpdate: A tensor has another type.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != types[name]:
            raise RefusedUpdate(f"{sender} sent {name} as {tensor.dtype}, not as {types[name]}")


def _check_size(changes: Iterable[Tensor], what: str, sender: str) -> None:
    """Checks that a client's change is small enough for the other clients to compute with.

    Args:
        changes: Tensors that the norm is taken over.
        what: Noun and verb for the message.
        sender: Number and name of the client, for the message.

    Raises:
        RefusedUpdate: The norm is above `LARGEST_CHANGE`.
    """
    norms = [float(torch.linalg.vector_norm(change)) for change in changes]
    norm = math.hypot(*norms)
    if norm > LARGEST_CHANGE:  # NaN was refused by `check_fits`
        raise RefusedUpdate(f"{sender} sent {what} by a norm of {norm:.3g}, not by up to {LARGEST_CHANGE:.0e}")


class _Report:
    """The metrics of a reply, each checked as it is read."""

    def __init__(self, reply: Reply, sender: str) -> None:
        self._metrics = reply.metrics
        self._sender = sender

    def check_client(self, client: int) -> None:
        """Checks that a client reports the number of the node that the reply came from.

        Raises:
            RefusedUpdate: The client reports another number.
        """
        claimed = self._metrics.get("client")
        if type(claimed) is not int or claimed != client:
            raise RefusedUpdate(f"{self._sender} says that it is client {_shown(claimed)}")

    def check_memory(self) -> None:
        """Checks the memory of the client's process.

        Raises:
            RefusedUpdate: The number is missing or out of range.
        """
        self.count("peak-memory", most=LARGEST_MEMORY)

    def check_seconds(self, *metrics: str) -> None:
        """Checks durations of the client's work.

        Raises:
            RefusedUpdate: A number is missing or out of range.
        """
        for metric in metrics:
            self.amount(metric, most=LARGEST_DURATION)

    def check_sample(self, workload: Workload) -> None:
        """Checks the score on the client's sample.

        Raises:
            RefusedUpdate: A number is missing or out of range.
        """
        tokens = self.count("sample-tokens", most=workload.sample)
        self.amount("sample-nats", most=LARGEST_LOSS * tokens)

    def check_norm_bit(self) -> None:
        """Checks the bit of adaptive clipping, if there is one.

        Raises:
            RefusedUpdate: The bit is neither 0 nor 1.
        """
        if NORM_BIT in self._metrics:
            self.count(NORM_BIT, "its bit of clipping", most=1)

    def router_loss(self, workload: Workload) -> float | None:
        """Returns the auxiliary loss of routers; None for a model without balanced routers.

        Raises:
            RefusedUpdate: The loss is missing or not possible, or the model has no balanced routers.
        """
        if workload.routers:
            return self.amount("router-loss")
        if "router-loss" in self._metrics:
            raise RefusedUpdate(f"{self._sender} sent a router-loss, and the model has no routers that are balanced")
        return None

    def count(
        self,
        name: str,
        noun: str = "",
        least: int = 0,
        most: int | None = None,
    ) -> int:
        """Returns a whole number.

        Args:
            name: Name of the metric.
            noun: Words for the metric in a message; empty for its name.
            least: Smallest possible number.
            most: Largest possible number; None for no bound.

        Raises:
            RefusedUpdate: The metric is missing, no whole number or out of range.
        """
        value = self._metrics.get(name)
        # `type`, not `isinstance`: True and False are instances of int.
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
        if type(value) not in (int, float) or not 0 <= value <= most:  # NaN fits no bounds
            raise RefusedUpdate(f"{self._sender} sent {_shown(value)} as its {name}, not a number from 0 to {most:g}")
        return float(value)

    def sum_and_count(self, metric: str) -> tuple[float, float]:
        """Returns the sum and the count of a metric.

        Raises:
            RefusedUpdate: The metric is missing, or is not two numbers of a possible size. Sum and count may both be 0.
        """
        value: Any = self._metrics.get(f"{METRIC}{metric}")
        numbers = value if isinstance(value, list) else []
        is_pair = len(numbers) == 2 and all(map(_is_bounded, numbers))
        has_mean = is_pair and numbers[1] >= LEAST_COUNT
        measured_nothing = is_pair and numbers == [0, 0]
        if not has_mean and not measured_nothing:
            sent = " and ".join(map(_shown, numbers[:2])) or _shown(value)
            raise RefusedUpdate(f"{self._sender} sent {sent} as its metric {metric}, not a sum and a count")
        return float(numbers[0]), float(numbers[1])


def _is_bounded(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST_SUM  # type: ignore[arg-type]  # a number by now


def _shown(value: object) -> str:
    """Returns a value for a message: a single number as it is, nothing of a list."""
    if value is None:
        return "nothing"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    return f"{value}" if isinstance(value, int | float) else f"a {type(value).__name__}"
