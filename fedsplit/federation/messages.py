"""Messages between the server and its clients, in our own types.

A door carries them: Flower's engine in Flower's records, an engine in this process as they are. A request is typed,
since the server made it. A reply is what arrived: nothing in it is believed before `fedsplit.federation.replies` has
checked it.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fedsplit.lowrank import LowRank
from fedsplit.scores import Score
from fedsplit.tensor_files import pack_changes
from fedsplit.updates import Adapters, ClientUpdate, Task
from fedsplit.wire.transport import TrunkLost

ADAPTERS, CONTROL = "arrays", "control"
"""Groups of tensors in a reply: adapters, and the change of a control variate."""

EXAMPLES = "num-examples"
"""Metric that says how many examples a client trained on, or how many predictions it measured."""

METRIC = "metric."
"""Beginning of the names under which the sum and the count of a user's metric travel."""

TRUNK_LOST = TrunkLost.__name__
"""Kind of a failure whose cause is that the trunk is gone."""

CLIENT_LOST = "ClientLost"
"""Kind of a failure whose cause is that the client's process, or its node, is gone."""

LATE = "Late"
"""Kind of a failure whose cause is that the client has not answered before the deadline of the round."""


@dataclass(frozen=True)
class Briefing:
    """Facts that are the same in every request of a run.

    Attributes:
        run: Configuration of the run, as JSON.
        trunk: Name by which a client process finds the trunk; names the run, too.
        incarnation: Life of the trunk that requests are meant for.
        threads: Threads of each client process.
        store: Folder of the clients' disks.
        personal: Factors that stay with their clients, such as "B".
        stage: True if the strategy has a gradient stage at the clients.
    """

    run: str
    trunk: str
    incarnation: str
    threads: int
    store: str
    personal: str = ""
    stage: bool = False


@dataclass(frozen=True)
class Request:
    """Fields of every request.

    Attributes:
        briefing: Facts of the run.
        client: Number of the client that is asked.
        round: Round, from 1; 0 before the first one.
        attempt: Number of earlier attempts at this round.
        accepted: Last round of which the server accepted this client's update; 0: none.
        folded: Last round that changed base weights.
        folds: Number of rounds until then that changed base weights at the clients.
        discarded: Attempts discarded so far whose changes of base weights a client may have made.
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
        wants_start: True if the client is to say what training starts from. The first client always says it.
    """

    wants_start: bool = False


@dataclass(frozen=True)
class Train(Request):
    """Asks a client for a round of local training.

    Attributes:
        tensors: Adapters that the client does not hold already, by exported name.
        task: Terms of the strategy, with the server's control variate.
        drawn: Seed from which the client draws its factors; None: the factors are sent or held.
        rank: Rank of the client's adapters.
        kept: Rounds whose state the client keeps on its disk, since checkpoints of the server go back to them.
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
    """A client's answer as it arrived.

    Attributes:
        client: Number of the client, by the way the reply came and not by what it says.
        metrics: Numbers that the client reports.
        tensors: Tensors by group (`ADAPTERS`, `CONTROL`, or a part's name) and exported name.
        about: An introduction, as JSON.
        malformed: Reason why tensors could not be read; empty where all could.
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
    """A client that did not answer.

    Attributes:
        client: Number of the client; -1 where it is not known.
        kind: Name of the error's class, such as "Diverged" or `TRUNK_LOST`.
        reason: One line for the reader.
    """

    client: int
    kind: str
    reason: str


Answer = Reply | Failure


def serialised_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Returns the bytes of tensors as numpy writes them: the values, and a header for each.

    Flower's records hold tensors in this form, so that every engine counts the same.
    """
    return sum(_header_bytes(tensor) + tensor.nbytes for tensor in tensors.values())


def _header_bytes(tensor: Tensor) -> int:
    """Returns the bytes of numpy's header for a tensor, which depend on its shape alone."""
    values = tensor.detach().numpy()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    return len(header.getvalue())


def trained(update: ClientUpdate, returned: Collection[str], own: Score, peak_memory: int) -> Reply:
    """Makes the reply to `Train`.

    Args:
        update: Outcome of local training.
        returned: Names of the adapters that go to the server.
        own: Score on the client's sample, right after its own steps.
        peak_memory: Largest resident memory of the client's process, in bytes.
    """
    metrics: dict[str, Any] = {
        "client": update.client,
        EXAMPLES: update.examples,
        "tokens": update.tokens,
        "loss": update.loss,
        "sample-nats": own.nats,
        "sample-tokens": own.tokens,
        "peak-memory": peak_memory,
    }
    if update.router_loss is not None:
        metrics["router-loss"] = update.router_loss

    groups = {ADAPTERS: _only(update.adapters.tensors, returned)}
    control = _only(update.control, returned)
    if control:
        groups[CONTROL] = control
    return _reply(update.client, metrics, groups)


def measured(client: int, score: Score, part: Score, peak_memory: int) -> Reply:
    """Makes the reply to `Evaluate`.

    Args:
        client: Number of the client.
        score: Score on all held-out text.
        part: Score on the sample that the client also measures after its own steps.
        peak_memory: Largest resident memory of the client's process, in bytes.
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
    }
    for name, (total, count) in score.metrics.items():
        metrics[f"{METRIC}{name}"] = [total, count]
    return _reply(client, metrics, {})


def introduction(client: int, about: str, start: Mapping[str, Adapters]) -> Reply:
    """Makes the reply to `Introduce`.

    Args:
        client: Number of the client.
        about: Name, parameters and layers, as JSON.
        start: Adapters of bottom and top that training starts from; empty where another client sends them.
    """
    return _reply(client, {}, {part: adapters.tensors for part, adapters in start.items()}, about)


def _reply(
    client: int, metrics: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]], about: str = ""
) -> Reply:
    nbytes = sum(map(serialised_bytes, groups.values()))
    return Reply(client, metrics, groups, about, nbytes=nbytes)


def _only(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    chosen = set(names)
    return {name: tensor for name, tensor in tensors.items() if name in chosen}
