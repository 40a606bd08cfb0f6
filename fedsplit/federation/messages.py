"""Messages between server and clients.

The engine `local` passes the objects on. The other engines carry messages as Flower's records. The server makes
requests, so that their types are certain. Replies come from clients: `fedsplit.federation.replies` checks every value
of a reply before use.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fedsplit.lowrank import LowRank
from fedsplit.scores import Score
from fedsplit.tensor_files import pack_changes
from fedsplit.updates import Adapters, ClientUpdate, Task
from fedsplit.wire.transport import TrunkLost

ADAPTERS = "arrays"
"""Group of the adapters in a reply. Flower's strategies expect this name."""

CONTROL = "control"
"""Group with the change of a control variate in a reply."""

EXAMPLES = "num-examples"
"""Metric with the number of training examples of a client, or with the number of measured predictions."""

SECONDS = "seconds"
"""Metric with the time that a client's work on a request took, without waiting for a free process."""

SAMPLE_SECONDS = "sample-seconds"
"""Metric with the time that a client measured its sample after local training."""

METRIC = "metric."
"""Prefix of the names of a user's metrics, each sent as a sum and a count."""

TRUNK_LOST = TrunkLost.__name__
"""Kind of a failure after the loss of the trunk."""

CLIENT_LOST = "ClientLost"
"""Kind of a failure after the loss of the client's process or node."""

LATE = "Late"
"""Kind of a failure by a missed deadline of the round."""


@dataclass(frozen=True)
class Briefing:
    """Facts that all requests of a run share.

    Attributes:
        run: Configuration of the run, as JSON.
        trunk: Name by which a client process finds the trunk. It is also a name of the run.
        incarnation: Incarnation of the trunk that serves the requests.
        threads: Threads of each client process.
        store: Folder of the clients' disks.
        personal: Factors that stay at the clients, such as "B".
        stage: True if the strategy has a gradient stage at the clients.
        model: Digests of the base model's files by name, as JSON, for sites with a base model of their own; else empty.
    """

    run: str
    trunk: str
    incarnation: str
    threads: int
    store: str
    personal: str = ""
    stage: bool = False
    model: str = ""


@dataclass(frozen=True)
class Request:
    """Fields of every request.

    Attributes:
        briefing: Facts of the run.
        client: Number of the client.
        round: Round, from 1; 0 before the first round.
        attempt: Number of earlier attempts at the round.
        accepted: Last round in which the server accepted the client's update; 0 for none.
        folded: Last round that changed base weights.
        folds: Number of rounds, up to `folded`, that changed base weights at the clients.
        discarded: Number of discarded attempts whose changes of base weights a client may have applied.
    """

    briefing: Briefing
    client: int
    round: int = 0
    attempt: int = 0
    accepted: int = 0
    folded: int = 0
    folds: int = 0
    discarded: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the request, serialised."""
        return 0


@dataclass(frozen=True)
class Introduce(Request):
    """Asks a client for its name and the parameters of its parts.

    Attributes:
        wants_start: True if the reply must hold the initial adapters. The first client always sends them.
    """

    wants_start: bool = False


@dataclass(frozen=True)
class Train(Request):
    """Asks a client for a round of local training.

    Attributes:
        tensors: Adapters that the client does not hold yet, by exported name.
        task: Terms of the strategy, with the server's control variate.
        drawn: Seed from which the client draws factors; None if the server sends them or the client holds them.
        rank: Rank of the client's adapters.
        kept: Rounds whose state the client must keep on disk, since a checkpoint goes back to the round.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    task: Task = field(default_factory=Task)
    drawn: int | None = None
    rank: int = 1
    kept: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of adapters and control variate, serialised."""
        return serialised_bytes(self.tensors) + serialised_bytes(self.task.control or {})


@dataclass(frozen=True)
class Evaluate(Request):
    """Asks a client for the loss on its held-out text.

    Attributes:
        tensors: Shared adapters, by exported name.
        changes: Changes of base weights in this round, by layer.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    changes: Mapping[str, LowRank] = field(default_factory=dict)

    @property
    def change_bytes(self) -> int:
        """Bytes of the changes of base weights, serialised."""
        return serialised_bytes(pack_changes(self.changes))

    @property
    def nbytes(self) -> int:
        """Bytes of adapters and changes, serialised."""
        return serialised_bytes(self.tensors) + self.change_bytes


@dataclass(frozen=True)
class Reply:
    """An unchecked answer of a client.

    Attributes:
        client: Number of the client that the engine received the reply from.
        metrics: Numbers that the client reports.
        tensors: Tensors by group (`ADAPTERS`, `CONTROL`, or a part's name) and exported name.
        about: An introduction, as JSON.
        malformed: Reason why tensors could not be read; empty if all could be read.
        nbytes: Bytes of all tensors, serialised.
    """

    client: int
    metrics: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    about: str = ""
    malformed: str = ""
    nbytes: int = 0


@dataclass(frozen=True)
class Failure:
    """The failure of a client to answer.

    Attributes:
        client: Number of the client; -1 if unknown.
        kind: Name of the error's class, such as "Diverged" or `TRUNK_LOST`.
        reason: One line for the reader.
    """

    client: int
    kind: str
    reason: str


TrainFrom = Callable[[Mapping[str, Tensor]], Reply]
"""Trains a client from adapters, by exported name, and returns the reply before a codec."""

Answer = Reply | Failure


def serialised_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Returns the size of tensors in numpy's file format, with a header for each tensor, in bytes.

    Flower's records use the format. With one format, all engines count the same bytes.
    """
    return sum(_header_bytes(tensor) + tensor.nbytes for tensor in tensors.values())


def _header_bytes(tensor: Tensor) -> int:
    """Returns the bytes of numpy's header for a tensor. They depend on the shape alone."""
    values = tensor.detach().numpy()  # a view, no copy
    header = io.BytesIO()
    # Written instead of computed: numpy pads a header to a multiple of 64 bytes.
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    return len(header.getvalue())


def trained(
    update: ClientUpdate,
    returned: Collection[str],
    own: Score,
    peak_memory: int,
    seconds: float = 0.0,
    sample_seconds: float = 0.0,
) -> Reply:
    """Makes the reply to `Train`.

    Args:
        update: Outcome of local training.
        returned: Names of the adapters for the server.
        own: Score on the client's sample, right after local training.
        peak_memory: Largest resident memory of the client's process, in bytes.
        seconds: Duration of the local steps.
        sample_seconds: Duration of the measurement of the sample.
    """
    metrics: dict[str, Any] = {
        "client": update.client,
        EXAMPLES: update.examples,
        "tokens": update.tokens,
        "loss": update.loss,
        "sample-nats": own.nats,
        "sample-tokens": own.tokens,
        "peak-memory": peak_memory,
        SECONDS: seconds,
        SAMPLE_SECONDS: sample_seconds,
    }
    if update.router_loss is not None:
        metrics["router-loss"] = update.router_loss

    groups = {ADAPTERS: _only(update.adapters.tensors, returned)}
    control = _only(update.control, returned)
    if control:  # an empty group would be refused as one that nobody asked for
        groups[CONTROL] = control
    return _reply(update.client, metrics, groups)


def with_adapters(reply: Reply, tensors: Mapping[str, Tensor]) -> Reply:
    """Returns a reply to `Train` with other tensors for the adapters, such as encoded ones."""
    return _reply(reply.client, reply.metrics, {**reply.tensors, ADAPTERS: tensors}, reply.about)


def measured(
    client: int,
    score: Score,
    part: Score,
    peak_memory: int,
    seconds: float = 0.0,
) -> Reply:
    """Makes the reply to `Evaluate`.

    Args:
        client: Number of the client.
        score: Score on all held-out text.
        part: Score on the sample that the client also measures after local training.
        peak_memory: Largest resident memory of the client's process, in bytes.
        seconds: Duration of the measurement.
    """
    metrics: dict[str, Any] = {
        "client": client,
        EXAMPLES: score.tokens,
        "loss": score.loss,
        "nats": score.nats,
        "right": score.right,
        "sample-nats": part.nats,
        "sample-tokens": part.tokens,
        "peak-memory": peak_memory,
        SECONDS: seconds,
    }
    for name, (total, count) in score.metrics.items():
        metrics[f"{METRIC}{name}"] = [total, count]
    return _reply(client, metrics, {})


def introduction(client: int, about: str, start: Mapping[str, Adapters]) -> Reply:
    """Makes the reply to `Introduce`.

    Args:
        client: Number of the client.
        about: Name, parameters and layers, as JSON.
        start: Initial adapters of bottom and top; empty if another client sends them.
    """
    groups = {part: adapters.tensors for part, adapters in start.items()}
    return _reply(client, {}, groups, about)


def _reply(
    client: int,
    metrics: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Tensor]],
    about: str = "",
) -> Reply:
    nbytes = sum(map(serialised_bytes, groups.values()))
    return Reply(client, metrics, groups, about, nbytes=nbytes)


def _only(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    chosen = set(names)
    return {name: tensor for name, tensor in tensors.items() if name in chosen}
