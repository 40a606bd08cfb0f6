"""Several trunks behind one port: each client has one of them, and their adapters are averaged after a round.

Under `copies`, `frozen` and `forward-only` the replicas share nothing that learns, so that a run gives the numbers of a
run with one trunk. Under the other schedules every replica trains the adapter with its own clients, as the groups of
Hydra (2511.09736) do.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsplit.settings.sections import TrunkSettings
from fedsplit.trunk import port
from fedsplit.trunk.port import CODEC, Control, Reply, TrunkPort, union
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.status import RoundCounts, TrunkStatus, with_joint_memory
from fedsplit.wire.packets import Packet
from fedsplit.wire.transport import PendingAnswer

T = TypeVar("T")


def replicas_of(clients: int, weights: Sequence[float]) -> list[int]:
    """Returns the replica of each client.

    Clients are ordered by a hash of their numbers, and dealt one after the other. Each client goes to the replica with
    the fewest clients for its weight. So replicas with equal weights have equally many clients, give or take one, and
    clients with similar numbers, whose data may be similar, are spread over the replicas.

    Args:
        clients: Number of clients.
        weights: Weight of each replica.

    Example:
        >>> replicas_of(clients=6, weights=[1.0, 1.0])
        [1, 1, 1, 0, 0, 0]
        >>> sorted(replicas_of(clients=8, weights=[3.0, 1.0]))
        [0, 0, 0, 0, 0, 0, 1, 1]
    """

    def place(client: int) -> bytes:
        return hashlib.sha256(f"replica of client {client}".encode()).digest()  # not `hash`, which differs by process

    replica_of = [0] * clients
    counts = [0] * len(weights)

    def load_with_one_more(replica: int) -> tuple[bool, float]:
        # Replicas without a client come first: a replica that serves nobody would be wasted.
        return counts[replica] > 0, (counts[replica] + 1) / weights[replica]

    for client in sorted(range(clients), key=place):
        replica = min(range(len(weights)), key=load_with_one_more)
        replica_of[client] = replica
        counts[replica] += 1
    return replica_of


class ReplicatedTrunk(TrunkPort):
    """Trunks that serve disjoint sets of clients.

    Adapters and moments are those of one trunk: a run may go on with another number of replicas.
    """

    def __init__(self, replicas: Sequence[TrunkPort], settings: TrunkSettings, clients: int) -> None:
        """Joins trunks.

        Args:
            replicas: The trunks, with equal adapters.
            settings: Schedule of the trunks, and the way in which they agree.
            clients: Number of clients.
        """
        schedule = SCHEDULES[settings.schedule]
        self._replicas = replicas
        self._replica_of = replicas_of(clients, settings.replica_weights)
        self._learn_as_one = settings.sync == "step"
        self._averages = schedule.learns and not schedule.personal and not self._learn_as_one

    def speeds(self) -> list[float]:
        """Measures the steps a second of each replica, one replica after the other."""
        return [1 / replica.measure_step() for replica in self._replicas]

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet to the client's replica, and returns a function that waits for the answer."""
        return self._replicas[self._replica_of[packet.key.client]].send(packet)

    def control(self, message: Control[Reply]) -> Reply:
        """Sends a control message to the replicas that it concerns, and returns the joined reply."""
        reply: Any
        match message:
            case port.Leave(client) | port.AssignAgain(client, _):
                reply = self._replicas[self._replica_of[client]].control(message)
            case port.ReadAdapter():
                reply = self._replicas[0].control(message)  # between rounds, all replicas have the same adapter
            case port.EndRound():
                reply = self._end_round(message)
            case port.ReadCopies():
                reply = union(self._ask_all(message))
            case port.ReadMoments():
                reply = union(self._ask_all(message)[::-1])  # the shared adapter's are those of the first replica
            case port.TakeTrace():
                reply = tuple(itertools.chain.from_iterable(self._ask_all(message)))
            case port.ReadStatus():
                reply = _joined_status(self._ask_all(message))
            case _:
                reply = self._ask_all(message)[0]
        return reply

    def _ask_all(self, message: Control[Any]) -> list[Any]:
        """Sends each replica its share of a message, and returns the replies."""

        def ask(number: int) -> Any:
            return self._replicas[number].control(self._for_replica(message, number))

        numbers = range(len(self._replicas))
        if not self._learn_as_one:
            return [ask(number) for number in numbers]
        # All at once: a replica may be waiting for the share of another one, which the message ends.
        with ThreadPoolExecutor(len(numbers)) as pool:
            return list(pool.map(ask, numbers))

    def _for_replica(self, message: Control[Any], number: int) -> Control[Any]:
        """Returns the share of a message that concerns the clients of one replica."""

        def is_here(client: int) -> bool:
            return self._replica_of[client] == number

        def here(by_client: Mapping[int, Any]) -> dict[int, Any]:
            return {client: value for client, value in by_client.items() if is_here(client)}

        of_replica = message
        match message:
            case port.BeginGroup(clients):
                of_replica = port.BeginGroup(tuple(filter(is_here, clients)))
            case port.EndRound(finished):
                of_replica = port.EndRound(tuple(filter(is_here, finished)))
            case port.AssignCopies(starts):
                of_replica = port.AssignCopies(here(starts))
            case port.ReadCopies(clients):
                of_replica = port.ReadCopies(tuple(filter(is_here, clients)))
            case port.WriteAdapter(tensors, personal):
                of_replica = port.WriteAdapter(tensors, here(personal))
            case port.Restore(tensors, moments):
                of_replica = port.Restore(tensors, _moments_where(moments, is_here))
        return of_replica

    def _end_round(self, message: port.EndRound) -> RoundCounts:
        """Ends the round at all replicas, and averages what they have learned."""
        counts = self._ask_all(message)
        sequences = [count.sequences for count in counts]
        if self._averages and any(sequences):
            self._average(sequences)
        joined = RoundCounts()
        for event in fields(RoundCounts):
            setattr(joined, event.name, sum(getattr(count, event.name) for count in counts))
        if self._learn_as_one:  # every replica counts every step
            joined.steps = max(count.steps for count in counts)
        return joined

    def _average(self, sequences: Sequence[int]) -> None:
        """Gives all replicas the average of their adapters and optimisers' states.

        Args:
            sequences: Number of sequences that each replica has learned from, the weight in the average.
        """
        moments = [replica.moments() for replica in self._replicas]
        # A replica whose clients were not sampled still has the adapter from before the round.
        trained = [number for number, weight in enumerate(sequences) if weight]
        weights = [sequences[number] for number in trained]
        averaged = _average([self._replicas[number].read().tensors for number in trained], weights)
        optimisers = _average([_shared(moments[number]) for number in trained], weights)
        codecs = _codecs(union(moments))
        restored = port.Restore(averaged, {**optimisers, **codecs})
        for number, replica in enumerate(self._replicas):
            replica.control(self._for_replica(restored, number))


def _client_of(name: str) -> int | None:
    """Returns the client in the name of a moment; None for the shared adapter's moments.

    Example:
        >>> _client_of("3/layer.lora_A.weight:exp_avg"), _client_of("codec/4/gradient/up/0/0"), _client_of("layer:step")
        (3, 4, None)
    """
    first, slash, _ = name.removeprefix(CODEC).partition("/")
    return int(first) if slash else None


def _moments_where(moments: Mapping[str, Tensor], is_here: Callable[[int], bool]) -> dict[str, Tensor]:
    """Returns the moments of the shared adapter, and of some clients."""
    selected = {}
    for name, value in moments.items():
        client = _client_of(name)
        if client is None or is_here(client):
            selected[name] = value
    return selected


def _shared(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _moments_where(moments, lambda client: False)


def _codecs(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in moments.items() if name.startswith(CODEC)}


def _average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[int]) -> dict[str, Tensor]:
    """Returns the weighted mean of tensors, name by name, over the states that have the name."""
    averaged = {}
    for name in union(states):
        # In float64: the mean of equal values is then this value, to the bit.
        total = torch.zeros((), dtype=torch.float64)
        weight_of_name = 0
        for state, weight in zip(states, weights, strict=True):
            if name in state:
                total = total + weight * state[name].double()
                weight_of_name += weight
        kind = next(state[name].dtype for state in states if name in state)
        averaged[name] = (total / weight_of_name).to(kind)
    return averaged


def _joined_status(statuses: Sequence[TrunkStatus]) -> TrunkStatus:
    """Returns the state of all replicas together. A parameter is counted once, since the replicas are equal."""
    first = statuses[0]
    traffic = first.traffic.copy()
    for status in statuses[1:]:
        for purpose, crossed in vars(status.traffic).items():
            setattr(traffic, purpose, getattr(traffic, purpose) + crossed)
    joined = replace(
        first,
        traffic=traffic,
        pending=sum(status.pending for status in statuses),
        sessions=sum(status.sessions for status in statuses),
        least_memory=max(status.least_memory for status in statuses),
        over_socket=sum(status.over_socket for status in statuses),
    )
    return with_joint_memory(joined, statuses)
