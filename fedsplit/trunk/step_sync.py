"""Replicas that learn as one trunk (`--trunk.sync step`): their gradients are summed, and one optimiser makes the step.

The first replica holds the master, the only adapter with an optimiser. Every replica, the first one included, sends its
share of a step to the master, and waits for the adapter after the step. Its own adapter is a mirror of the master's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from fedsplit.model.devices import CPU, put
from fedsplit.trunk.status import RoundCounts
from fedsplit.trunk.trainable import TrainableAdapter, Unusable

CLOSING_SECONDS = 600.0
"""Time in which all replicas must end a round. A replica that is lost is noticed long before."""


@dataclass(frozen=True)
class Share:
    """Share of one replica in a step of the optimiser.

    Attributes:
        gradients: Sum of gradients by exported name, on the CPU; empty if the replica has nothing to add.
        count: Number of gradients in the sum that the step averages over; 0 for a step with the sum itself.
        rates: Shares of the learning rate that the clients asked for.
        round: Number of the round.
        version: Version of the adapter that the gradients belong to.
    """

    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    count: int = 0
    rates: Sequence[float] = ()
    round: int = 0
    version: int = 0


@dataclass(frozen=True)
class Newest:
    """The adapter after the newest step.

    Attributes:
        version: Number of changes of the adapter so far.
        tensors: Adapter by exported name, on the CPU.
        steps: Number of steps of the optimiser so far.
        is_late: True for an answer to a share that was dropped.
    """

    version: int
    tensors: Mapping[str, Tensor]
    steps: int
    is_late: bool = False


class Peers(Protocol):
    """The way of one replica to the master. Every call waits for the master."""

    def enter(self) -> None:
        """Tells that the replica has clients that train. Steps wait for the replica from now on."""
        ...

    def leave(self) -> None:
        """Tells that no client of the replica trains any more."""
        ...

    def step(self, share: Share) -> Newest:
        """Adds a share to a step, waits for the shares of all replicas that have entered, and returns the adapter.

        A share that is late, since the step was made without it, is dropped.

        Raises:
            Unusable: The step was not made.
        """
        ...

    def close(self, share: Share) -> Newest:
        """Adds a share to the last step of a round, waits for all replicas, and returns the adapter.

        Raises:
            Unusable: The step was not made.
        """
        ...

    def newest(self, version: int) -> Newest | None:
        """Returns the adapter if it has changed since a version, else None."""
        ...


@dataclass
class _Exchange:
    """One step in the making.

    Attributes:
        shares: Shares so far, by replica.
        newest: Adapter after the step; None before.
        error: Reason for which the step was not made.
    """

    shares: dict[int, Share] = field(default_factory=dict)
    newest: Newest | None = None
    error: Unusable | None = None

    @property
    def is_over(self) -> bool:
        """True once all replicas may go on."""
        return self.newest is not None or self.error is not None


class Master:
    """The adapter of all replicas, with the only optimiser. Many threads may call all methods."""

    def __init__(self, make: Callable[[], TrainableAdapter], replicas: int, patience: float | None) -> None:
        """Starts with the initial adapter.

        Args:
            make: Makes an adapter with an optimiser, from the initial values.
            replicas: Number of replicas.
            patience: Seconds that a step waits for a late replica; None for ever.
        """
        self._adapter = make()
        self._replicas = replicas
        self._patience = patience
        self._entered: set[int] = set()
        self._version = 0
        self._steps = 0
        self._exchange = _Exchange()
        self._closing = _Exchange()
        self._changed = threading.Condition()

    def enter(self, replica: int) -> None:
        """See `Peers.enter`."""
        with self._changed:
            self._entered.add(replica)

    def leave(self, replica: int) -> None:
        """See `Peers.leave`."""
        with self._changed:
            self._entered.discard(replica)
            self._settle()

    def step(self, replica: int, share: Share) -> Newest:
        """See `Peers.step`. After `patience` the step is made without the replicas that are late."""
        with self._changed:
            self._entered.add(replica)
            # The step was made without this replica. Gradients for an older adapter must not join a later step.
            if share.version != self._version:
                return replace(self._newest(), is_late=True)
            exchange = self._exchange  # the waiting thread must keep its own step: others begin the next one meanwhile
            exchange.shares[replica] = share
            self._settle()
            if not self._changed.wait_for(lambda: exchange.is_over, self._patience):
                self._make_step(exchange)
                self._exchange = _Exchange()  # who comes later begins another step
            return _result(exchange)

    def close(self, replica: int, share: Share) -> Newest:
        """See `Peers.close`.

        Raises:
            TimeoutError: A replica has not ended the round.
        """
        with self._changed:
            # Replicas that are still at work must not wait for this one any more.
            self._entered.discard(replica)
            self._settle()
            exchange = self._closing
            exchange.shares[replica] = share
            if len(exchange.shares) == self._replicas:
                self._make_step(exchange)
                self._closing = _Exchange()
            elif not self._changed.wait_for(lambda: exchange.is_over, CLOSING_SECONDS):
                raise TimeoutError(f"a replica of the trunk has not ended the round in {CLOSING_SECONDS:g} seconds")
            return _result(exchange)

    def newest(self, version: int) -> Newest | None:
        """See `Peers.newest`."""
        with self._changed:
            return self._newest() if version < self._version else None

    def moments(self) -> dict[str, Tensor]:
        """Returns the state of the optimiser."""
        with self._changed:
            return self._adapter.moments()

    def write(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor] | None = None) -> None:
        """Replaces the adapter, and the state of the optimiser if given. Steps in the making are dropped."""
        with self._changed:
            self._adapter.write(tensors)
            if moments is not None:
                self._adapter.restore(moments)
            self._version += 1  # shares for the former adapter are late from now on
            for exchange in (self._exchange, self._closing):
                # A replica that waits for the dropped step gets the written adapter: it would wait for ever otherwise.
                exchange.newest = replace(self._newest(), is_late=True)
            self._exchange = _Exchange()
            self._closing = _Exchange()
            self._changed.notify_all()

    def _settle(self) -> None:
        """Makes the step if all replicas that have entered have added their shares."""
        exchange = self._exchange
        if exchange.shares and self._entered <= exchange.shares.keys():
            self._exchange = _Exchange()
            self._make_step(exchange)

    def _make_step(self, exchange: _Exchange) -> None:
        """Makes a step with the sum of all shares, in the order of the replicas."""
        # In a fixed order, since a sum of floating-point numbers depends on the order.
        shares = [share for _, share in sorted(exchange.shares.items()) if share.gradients]
        try:
            if shares:
                self._learn(shares)
            exchange.newest = self._newest()
        except Unusable as error:
            exchange.error = error
        self._changed.notify_all()

    def _learn(self, shares: Sequence[Share]) -> None:
        """Makes a step of the optimiser with the sum or mean of some shares, at the mean rate of the clients."""
        gradients = dict(shares[0].gradients)
        for share in shares[1:]:
            for name, gradient in share.gradients.items():
                gradients[name] = gradients[name] + gradient
        count = sum(share.count for share in shares)
        if count:
            gradients = {name: gradient / count for name, gradient in gradients.items()}
        rates = [rate for share in shares for rate in share.rates]
        round = max(share.round for share in shares)
        self._adapter.step(gradients, sum(rates) / len(rates), round)
        self._version += 1
        self._steps += 1

    def _newest(self) -> Newest:
        tensors = {name: tensor.detach() for name, tensor in self._adapter.snapshot.items()}
        return Newest(self._version, put(tensors, CPU), self._steps)


def _result(exchange: _Exchange) -> Newest:
    if exchange.error is not None:
        raise exchange.error
    assert exchange.newest is not None
    return exchange.newest


@dataclass(frozen=True)
class LocalPeers:
    """The way of a replica to a master in the same process.

    Attributes:
        master: The master.
        replica: Number of the replica.
    """

    master: Master
    replica: int

    def enter(self) -> None:
        """See `Peers.enter`."""
        self.master.enter(self.replica)

    def leave(self) -> None:
        """See `Peers.leave`."""
        self.master.leave(self.replica)

    def step(self, share: Share) -> Newest:
        """See `Peers.step`."""
        return self.master.step(self.replica, share)

    def close(self, share: Share) -> Newest:
        """See `Peers.close`."""
        return self.master.close(self.replica, share)

    def newest(self, version: int) -> Newest | None:
        """See `Peers.newest`."""
        return self.master.newest(version)


Make = Callable[[], TrainableAdapter]
"""Makes an adapter with an optimiser, from the initial values of a run."""

Join = Callable[[Make], tuple[Peers, Master | None]]
"""Returns a replica's way to the master, and the master where it lives in the replica."""


def first_of(replicas: int, patience: float | None) -> Join:
    """Returns the way of the first replica, which makes the master.

    Args:
        replicas: Number of replicas.
        patience: Seconds that a step waits for a late replica; None for ever.
    """

    def join(make: Make) -> tuple[Peers, Master]:
        master = Master(make, replicas, patience)
        return LocalPeers(master, 0), master

    return join


class Mirror:
    """The shared adapter of one replica, as a mirror of the master's."""

    def __init__(self, peers: Peers, adapter: TrainableAdapter, counts: RoundCounts) -> None:
        """Starts with the initial adapter, which is the master's, too.

        Args:
            peers: Way to the master.
            adapter: Adapter with which the replica computes.
            counts: Counts of the round. The mirror counts "steps".
        """
        self._peers = peers
        self._adapter = adapter
        self._counts = counts
        self._version = 0
        self._steps = 0
        self._is_attended = False

    def attend(self, is_attended: bool) -> None:
        """Tells the master whether steps should wait for the replica."""
        if is_attended == self._is_attended:  # a call of the master may cross machines
            return
        self._is_attended = is_attended
        if is_attended:
            self._peers.enter()
        else:
            self._peers.leave()

    def refresh(self) -> None:
        """Takes over the newest adapter."""
        newest = self._peers.newest(self._version)
        if newest is not None:
            self._take(newest)

    def step(
        self,
        gradients: Mapping[str, Tensor],
        count: int,
        rates: Sequence[float],
        round: int,
        is_last: bool = False,
    ) -> bool:
        """Makes a step together with the other replicas.

        Args:
            gradients: Sum of gradients by exported name; empty if the replica has nothing to add.
            count: Number of gradients in the sum that the step averages over; 0 for a step with the sum itself.
            rates: Shares of the learning rate that the clients asked for.
            round: Number of the round.
            is_last: True for the last step of the round, which waits for all replicas.

        Returns:
            False if the step had been made without this replica.

        Raises:
            Unusable: The step was not made.
        """
        share = Share(put(gradients, CPU), count, rates, round, self._version)
        newest = self._peers.close(share) if is_last else self._peers.step(share)
        self._take(newest)
        return not newest.is_late

    def _take(self, newest: Newest) -> None:
        if newest.version == self._version:
            return
        self._adapter.write(newest.tensors)
        self._version = newest.version
        # Steps that other replicas made meanwhile count, too: every replica reports all steps.
        self._counts.steps += max(0, newest.steps - self._steps)
        self._steps = newest.steps
