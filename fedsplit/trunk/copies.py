"""Clients' copies of the trunk's adapter, under the schedule `copies`, and their optimisers between rounds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedsplit.model.devices import CPU, put
from fedsplit.optimization.optim import fitting
from fedsplit.stages import Outcome
from fedsplit.trunk.trainable import AdapterSnapshot, TrainableAdapter
from fedsplit.updates import Adapters, Layer, Task


@dataclass(frozen=True)
class Start:
    """State of a client's copy of the trunk's adapter at the beginning of a round.

    Attributes:
        tensors: Adapter by exported name. Clients may differ in rank.
        task: Instructions of the strategy.
        own: Control variate of the client for the tensors.
        afresh: True if the adapter does not continue the client's last adapter. The optimiser's state of earlier rounds
            then does not fit, and is dropped.
        kept: State of the strategy's gradient stage for the copy, from the client's last round.
    """

    tensors: Mapping[str, Tensor]
    task: Task = field(default_factory=Task)
    own: Mapping[str, Tensor] = field(default_factory=dict)
    afresh: bool = False
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Copy:
    """A client's copy of the trunk's adapter at the end of a round.

    Attributes:
        adapters: Adapter after the client's last step.
        control: Change of the client's control variate.
        kept: State of the strategy's gradient stage after the round.
        steps: Number of steps of the optimiser; None for a copy without a tensor that learns.
    """

    adapters: Adapters
    control: Mapping[str, Tensor]
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    steps: int | None = None


class ClientCopies:
    """Holds the copy of each client in a round. Between rounds, holds the states of the optimisers.

    A copy lives for one round. The state of an optimiser stays from round to round, if the run keeps such states.
    """

    def __init__(
        self,
        make: Callable[[Start], TrainableAdapter],
        layers: Mapping[str, Layer],
        keeps_moments: bool,
    ) -> None:
        """Starts without copies.

        Args:
            make: Returns a new trainable adapter.
            layers: Layers of the adapter.
            keeps_moments: True to continue the optimiser's state of a client in the client's next round.
        """
        self._make = make
        self._layers = layers
        self._keeps_moments = keeps_moments
        self._copies: dict[int, TrainableAdapter] = {}
        self._moments: dict[int, dict[str, Tensor]] = {}  # after each client's last round that counted

    def get(self, client: int) -> TrainableAdapter | None:
        """Returns a client's copy; None for a client without a copy."""
        return self._copies.get(client)

    def add(self, client: int, start: Start) -> TrainableAdapter:
        """Adds a copy for a client that begins without instructions, with a fresh optimiser. Returns the copy."""
        self._copies[client] = self._make(start)
        return self._copies[client]

    def assign_all(self, starts: Mapping[int, Start]) -> None:
        """Replaces all copies for the beginning of a round; see `assign`."""
        self._copies.clear()  # a client that is not sampled now must not be evaluated with an older copy
        for client, start in starts.items():
            self.assign(client, start)

    def assign(self, client: int, start: Start) -> None:
        """Sets the copy of a client that begins or repeats the round.

        The optimiser continues the state at the end of the client's last round that counted, if states are kept.

        Args:
            client: Number of the client. Steps of an earlier attempt at the round no longer count.
            start: State of the copy at the beginning.
        """
        copy = self._make(start)
        if start.afresh:  # moments are averages over gradients of the former factors
            self._moments.pop(client, None)
        copy.restore(self._moments.get(client, {}))
        self._copies[client] = copy

    def end_round(self, finished: Collection[int]) -> None:
        """Drops the copies of clients outside `finished`, and keeps the optimisers' states of the others."""
        for client in self._copies.keys() - set(finished):
            del self._copies[client]
        if not self._keeps_moments:
            return
        for client, copy in self._copies.items():
            # A round may train one factor alone. The state of the other factor stays.
            earlier = fitting(self._moments.get(client, {}), copy.snapshot)
            self._moments[client] = {**earlier, **copy.moments()}

    def read(self, clients: Collection[int] | None = None) -> dict[int, Copy]:
        """Returns the copies at the end of the round, by client.

        A copy that learns, but made no step, has neither control variate nor state of a stage.

        Args:
            clients: Clients with a finished round; all clients where not given.
        """
        copies = {}
        for client, copy in sorted(self._copies.items()):
            if clients is not None and client not in clients:
                continue  # an unfinished round may have ended in the middle, where a stage has no result
            steps = copy.steps if copy.learns else None
            outcome = Outcome() if steps == 0 else copy.outcome()  # without steps, a stage knows nothing of the round
            adapters = exported(copy.snapshot, self._layers)
            copies[client] = Copy(adapters, control=outcome.sent, kept=outcome.kept, steps=steps)
        return copies

    def moments(self) -> dict[str, Tensor]:
        """Returns the kept states of the optimisers, by "client/name"."""
        named = {}
        for client, moments in self._moments.items():
            for name, value in moments.items():
                named[f"{client}/{name}"] = value
        return named

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Sets the kept states of the optimisers to an earlier result of `moments`."""
        self._moments.clear()
        for name, value in moments.items():
            client, _, parameter = name.partition("/")
            self._moments.setdefault(int(client), {})[parameter] = value


def exported(snapshot: AdapterSnapshot, layers: Mapping[str, Layer]) -> Adapters:
    """Returns a snapshot of an adapter without gradients, on the CPU."""
    detached = {name: tensor.detach() for name, tensor in snapshot.items()}
    return Adapters(put(detached, CPU), layers)
