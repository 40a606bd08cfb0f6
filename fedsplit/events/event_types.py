"""The events of a run: frozen records with a name, documented fields, and a form for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

Phase = Literal["loading", "training", "evaluating"]
"""Steps of a run in which the server waits for its clients."""

Cause = Literal["unavailable", "late", "surplus"]
"""Reason why a client does not count in a round on the run's network."""


def reported(
    help: str,
    unit: str = "",
    default: Any = dataclasses.MISSING,
    omitted: bool = False,
) -> Any:
    """Declares a field of an event.

    Args:
        help: Description of the field.
        unit: Unit of its value; empty for names and plain counts.
        default: Value of a field that the caller may leave out.
        omitted: Leaves the field out of the JSON form where its value is None.
    """
    return dataclasses.field(default=default, metadata={"help": help, "unit": unit, "omitted": omitted})


def utc_now() -> str:
    """Returns the present time in UTC, in ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base class of all events.

    Example:
        >>> event = Notice(text="micro-batches: 2", time="2030-01-02T03:04:05.678+00:00")
        >>> event.to_document()
        {'event': 'notice', 'text': 'micro-batches: 2', 'warning': False, 'time': '2030-01-02T03:04:05.678+00:00'}
    """

    name: ClassVar[str]

    time: str = dataclasses.field(
        default_factory=utc_now, metadata={"help": "Time of the event in UTC, ISO 8601", "unit": "", "omitted": False}
    )

    def to_document(self) -> dict[str, Any]:
        """Returns the event as plain values, ready for `json.dumps`; the key `event` holds its name."""
        document: dict[str, Any] = {"event": self.name}
        for field in fields_of(type(self)):
            value = getattr(self, field.name)
            if value is None and field.metadata["omitted"]:
                continue
            document[field.name] = _plain(value)
        return document


def fields_of(kind: type[Event]) -> list[dataclasses.Field[Any]]:
    """Returns the fields of an event in the order of its JSON form: its own, then those of the base class."""
    base = {field.name for field in dataclasses.fields(Event)}
    # The sort is stable: the fields of one class stay in their order.
    return sorted(dataclasses.fields(kind), key=lambda field: field.name in base)


def _plain(value: Any) -> Any:
    """Returns a value with plain dictionaries and lists in place of other mappings and sequences."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """All clients have loaded their parts; training is about to begin."""

    name: ClassVar[str] = "run-started"

    settings: Mapping[str, Any] = reported("Settings of the run, nested as in config.toml")
    versions: Mapping[str, str] = reported("Versions of Python, fedsplit and the libraries that compute, by name")
    clients: Sequence[str] = reported("Names of the clients, by their number")
    parameters: Mapping[str, Mapping[str, int]] = reported("Parameters by part, `total` and `trainable`")
    aggregated_parts: Sequence[str] = reported("Parts whose adapters the strategy aggregates")
    after_round: int = reported("Last round of the run that is resumed; 0 for a new run")
    folder: str = reported("Folder of the run")


@dataclass(frozen=True, kw_only=True)
class RoundTrained(Event):
    """The clients of a round have trained, and their updates have arrived."""

    name: ClassVar[str] = "train"

    round: int = reported("Number of the round, from 1")
    loss: float | None = reported("Mean training loss over the clients; null where no client trained", "nats a token")
    clients: Mapping[str, float] = reported("Mean training loss by the client's name", "nats a token")
    router_aux_loss: float | None = reported(
        "Mean auxiliary loss of a mixture of experts, without its coefficient", default=None, omitted=True
    )
    learning_rate: float | None = reported(
        "Learning rate of the last local step of the round; under epochs the mean over the clients that trained, whose "
        "numbers of steps differ",
        default=None,
        omitted=True,
    )
    client_learning_rates: Mapping[str, float] | None = reported(
        "Learning rate of a client's last local step of the round, by the client's name", default=None, omitted=True
    )
    tokens: int = reported("Tokens that the clients trained on")
    seconds: float = reported("Duration of the training, from the first message to the last reply", "seconds")
    trunk: Mapping[str, Any] = reported(
        "Counts of the trunk's work in the round, its `resident_memory` in bytes, and the packets that came "
        "`over_socket` in all, not through Ray's calls"
    )
    elapsed: float = reported("Time since the command began, earlier commands of a resumed run included", "seconds")


@dataclass(frozen=True, kw_only=True)
class RoundAggregated(Event):
    """The strategy has aggregated the updates of a round."""

    name: ClassVar[str] = "aggregate"

    round: int = reported("Number of the round, from 1")
    seconds: float = reported("Duration of the aggregation", "seconds")
    error: float | None = reported("Aggregation error over all layers; null where it is not defined")
    layers: Mapping[str, float] = reported("Aggregation error by layer")
    residual_rank: Mapping[str, int] = reported("Rank of the change that is folded into base weights, by layer")
    elapsed: float = reported("Time since the command began, earlier commands of a resumed run included", "seconds")


@dataclass(frozen=True, kw_only=True)
class RoundEvaluated(Event):
    """The clients have measured the aggregated adapters on their held-out text."""

    name: ClassVar[str] = "evaluate"

    round: int = reported("Number of the round; 0 before training")
    loss: float = reported("Held-out loss, pooled over the clients' predictions", "nats a token")
    accuracy: float | None = reported(
        "Share of held-out texts whose class was found; for classification alone", default=None, omitted=True
    )
    perplexity: float | None = reported(
        "Exponential of the loss; not for classification and pairs", default=None, omitted=True
    )
    clients: Mapping[str, float] = reported("Held-out loss by the client's name", "nats a token")
    metrics: Mapping[str, float | None] | None = reported(
        "Mean of each of the user's metrics over all clients, by its name", default=None, omitted=True
    )
    client_metrics: Mapping[str, Mapping[str, float | None]] | None = reported(
        "Mean of each of the user's metrics, by its name and the client's", default=None, omitted=True
    )
    forgotten: Mapping[str, float] = reported(
        "Held-out loss now, less that right after the client's own steps, by the client's name", "nats a token"
    )
    adapter_bytes: Mapping[str, int] = reported("Bytes of adapters since the last evaluation, `up` and `down`", "bytes")
    bytes: Mapping[str, int] = reported(
        "Bytes since the last evaluation, by the kinds and directions of summary.json", "bytes"
    )
    tokens: int = reported("Predictions that were measured")
    seconds: float = reported("Duration of the evaluation", "seconds")
    elapsed: float = reported("Time since the command began, earlier commands of a resumed run included", "seconds")


@dataclass(frozen=True, kw_only=True)
class RoundCost(Event):
    """A round is committed: its bytes, seconds and tokens, which add up to the totals of the run."""

    name: ClassVar[str] = "cost"

    round: int = reported(
        "Number of the round; 0 before training. Bytes of attempts that were given up at the end of a run are of the "
        "round after the last"
    )
    bytes: Mapping[str, int] = reported(
        "Bytes since the last event of this kind, by the kinds and directions of summary.json; the sums over all "
        "events are the `bytes` of summary.json",
        "bytes",
    )
    client_bytes: Mapping[str, Mapping[str, int]] = reported(
        "The same bytes by kind and direction, and then by the client's name; without `client_files` and "
        "`between_stages`, which belong to no client",
        "bytes",
    )
    framing: Mapping[str, int] = reported(
        "Bytes of headers and lengths around the arrays, as frames on a socket have them, in the same form as `bytes`; "
        "kinds without any are left out",
        "bytes",
    )
    client_framing: Mapping[str, Mapping[str, int]] = reported("The same, in the form of `client_bytes`", "bytes")
    packets: Mapping[str, int] = reported("Number of packets that the trunk served, in the form of `framing`")
    client_packets: Mapping[str, Mapping[str, int]] = reported("The same, in the form of `client_bytes`")
    seconds: Mapping[str, float] = reported(
        "Time since the last event of this kind, by phase: `training`, `aggregation`, `evaluation`, and `other`, such "
        "as the start, checkpoints and discarded attempts",
        "seconds",
    )
    client_seconds: Mapping[str, Mapping[str, float]] = reported(
        "Duration of a client's own work without waiting for a free process, by phase and then by the client's name: "
        "`training`; `sample`, measured after training (`--eval.after`); `evaluation`",
        "seconds",
    )
    tokens: int = reported("Tokens that the clients trained on")
    client_tokens: Mapping[str, int] = reported("Tokens that a client trained on, by the client's name")
    tokens_per_second: float | None = reported(
        "Tokens a second of the round's training; null where no client trained", "tokens a second"
    )
    client_tokens_per_second: Mapping[str, float] = reported(
        "Tokens a second of a client's own steps, by the client's name", "tokens a second"
    )
    client_peak_memory: Mapping[str, int] = reported(
        "Largest resident memory so far of the process that played the client, by the client's name", "bytes"
    )
    elapsed: float = reported("Time since the command began, earlier commands of a resumed run included", "seconds")


@dataclass(frozen=True, kw_only=True)
class RoundReplayed(Event):
    """A committed round was replayed on the network of the run (`--network`): the virtual time that it would take."""

    name: ClassVar[str] = "network"

    round: int = reported("Number of the round; 0 before training")
    seconds: float = reported("Virtual time of the round, its training and its evaluation", "virtual seconds")
    training_seconds: float = reported("Virtual time until the server aggregates", "virtual seconds")
    evaluation_seconds: float = reported("Virtual time of the evaluation", "virtual seconds")
    virtual_elapsed: float = reported("Virtual time of all rounds so far", "virtual seconds")
    clients: Mapping[str, Mapping[str, float]] = reported(
        "Virtual time of each client that counts, by its name and then by place: `client_compute`, `wire_up`, "
        "`others` (waiting for other clients), `trunk_queue`, `trunk_compute`, `wire_down`; the sum over the places is "
        "the time of the phases that the client took part in",
        "virtual seconds",
    )
    arrivals: Mapping[str, float] = reported(
        "Time from the start of the round until the client's update is at the server, by its name", "virtual seconds"
    )
    stragglers: Sequence[str] = reported(
        "Clients that arrive later than 1.5 times the median arrival, the latest first"
    )
    late: Sequence[str] = reported("Clients whose update missed the deadline of the round")
    surplus: Sequence[str] = reported("Clients that `--network.over-select` asked and did not need")
    unavailable: Sequence[str] = reported("Clients that were asked to train and were not available")


@dataclass(frozen=True, kw_only=True)
class RoundEnded(Event):
    """A round is over; its checkpoint, where one is due, has been written or tried."""

    name: ClassVar[str] = "round-ended"

    round: int = reported("Number of the round; 0 before training")
    rounds: int = reported("Rounds of the run")
    training_loss: float | None = reported("Mean training loss; null where no client trained", "nats a token")
    held_out_loss: float | None = reported("Held-out loss; null where no client measured", "nats a token")
    accuracy: float | None = reported("Share of held-out texts whose class was found; for classification alone")
    metrics: Mapping[str, float | None] | None = reported(
        "Mean of each of the user's metrics over all clients, by its name", default=None, omitted=True
    )
    tokens_per_second: float = reported("Tokens a second of training, over the whole run", "tokens a second")
    virtual_elapsed: float | None = reported(
        "Virtual time of all rounds so far; with `--network` alone", "virtual seconds", default=None, omitted=True
    )
    elapsed: float = reported("Time since the command began, earlier commands of a resumed run included", "seconds")


@dataclass(frozen=True, kw_only=True)
class _OfClient:
    """Fields of the events in which a client drops out of a phase, or does not count."""

    round: int = reported("Number of the round; 0 before training")
    phase: Phase = reported("`loading`, `training` or `evaluating`")  # noqa: RUF009  # a field
    client: int = reported("Number of the client")
    client_name: str = reported("Name of the client")
    reason: str = reported("Reason in one line")
    attempt: int = reported("Number of earlier attempts at this round", default=0)


@dataclass(frozen=True, kw_only=True)
class ClientFailed(_OfClient, Event):
    """A client failed, or sent a reply that cannot be used; the phase goes on without it."""

    name: ClassVar[str] = "client-failed"

    refused: bool = reported("True for a reply that cannot be used, false for a client that failed", default=False)


@dataclass(frozen=True, kw_only=True)
class ClientUnused(_OfClient, Event):
    """A client does not count in a round on the network of the run (`--network`); this is no failure of the client."""

    name: ClassVar[str] = "client-unused"

    cause: Cause = reported(  # noqa: RUF009  # a field
        "`unavailable`: the client takes no part; `late`: its update misses the deadline in virtual time; `surplus`: "
        "`--network.over-select` asked more clients than needed, and others were faster"
    )


@dataclass(frozen=True, kw_only=True)
class ClientLost(_OfClient, Event):
    """The process of a client was lost; the client begins the phase again, with the same seeds."""

    name: ClassVar[str] = "client-lost"


@dataclass(frozen=True, kw_only=True)
class RoundDiscarded(Event):
    """A round could not stand, and leaves no trace; it is played again, or the run ends early."""

    name: ClassVar[str] = "round-discarded"

    round: int = reported("Number of the round; 0 for the evaluation before training")
    rounds: int = reported("Rounds of the run")
    attempt: int = reported("Number of earlier attempts at this round")
    reason: str = reported("Reason in one line")
    again: bool = reported("True if the round is played again, false if the run ends early")
    elapsed: float = reported("Time since the command began, earlier commands of a resumed run included", "seconds")


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """A client has replied, or a phase has begun."""

    name: ClassVar[str] = "progress"

    phase: Phase = reported("`loading`, `training` or `evaluating`")  # noqa: RUF009  # a field
    round: int = reported("Number of the round; 0 before training")
    rounds: int = reported("Rounds of the run")
    done: int = reported("Clients that are done with the phase")
    of: int = reported("Clients that take part in the phase")
    loss: float | None = reported("Mean training loss so far; null before the first", "nats a token", default=None)
    tokens_per_second: float | None = reported("Speed of training so far", "tokens a second", default=None)
    waiting: Sequence[str] = reported("Clients that were asked and have not answered, at most 8 of them", default=())
    failed: Sequence[str] = reported("Clients that have failed in this phase, at most 8 of them", default=())


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """A line for the reader."""

    name: ClassVar[str] = "notice"

    text: str = reported("The line")
    warning: bool = reported("True for a line about something that went wrong", default=False)


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """The run is over, and the adapters are written: all rounds are done, or the run has ended early."""

    name: ClassVar[str] = "run-ended"

    summary: Mapping[str, Any] = reported("Content of summary.json")
    folder: str = reported("Folder of the run")


@dataclass(frozen=True, kw_only=True)
class RunFailed(Event):
    """The run ended before its last round was over: it broke, or it was interrupted."""

    name: ClassVar[str] = "run-failed"

    reason: str = reported("Type and message of the exception")


EVENTS: tuple[type[Event], ...] = (
    RunStarted,
    Progress,
    Notice,
    ClientLost,
    ClientFailed,
    ClientUnused,
    RoundDiscarded,
    RoundTrained,
    RoundAggregated,
    RoundEvaluated,
    RoundCost,
    RoundReplayed,
    RoundEnded,
    RunEnded,
    RunFailed,
)
"""All kinds of events, in the order of a run."""
