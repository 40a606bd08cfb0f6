"""Bytes of adapters by round, by playing the server's side of a run: the strategy and the ledger, on invented updates.

The strategy is the run's own, and so is the ledger that knows which tensors a client holds already. Tensors that are no
LoRA factors have a stand-in of one value, since a strategy treats them value by value.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fedsplit.estimation.party_shapes import Parties
from fedsplit.estimation.phase_clock import Clock
from fedsplit.estimation.step_traffic import Traffic
from fedsplit.factors import Adapters, factor_of
from fedsplit.federation import messages
from fedsplit.federation.adapter_codec import AdapterCodec
from fedsplit.federation.adapter_ledger import AdapterLedger
from fedsplit.federation.aggregation import Aggregation, make_aggregation, strategy_defaults
from fedsplit.federation.clients import ClientNode
from fedsplit.federation.messages import serialised_bytes
from fedsplit.federation.rehearsal import InventedRoster, undisturbed
from fedsplit.federation.replies import without_tensors
from fedsplit.federation.strategy import load_strategy
from fedsplit.federation.travel import stays
from fedsplit.federation.virtual_time import TrainingTime
from fedsplit.scores import Score
from fedsplit.tensor_files import pack_changes
from fedsplit.updates import Assignment, ClientUpdate

PLAYED = 12
"""Largest number of rounds that are played. Later rounds repeat the last two of them in turn."""


_SHIFT = 1009
"""Values by which the changes of two clients are shifted: a prime, so that no two columns of factors are equal."""


@dataclass(frozen=True)
class RoundOfAdapters:
    """Adapters of one round.

    Attributes:
        down: Bytes of the adapters that each client is sent to train, by the number of each client that trains.
        up: Bytes of the adapters that each client sends back.
        news: Bytes of changes of base weights, which every client that measures is sent.
        measured: Bytes of the adapters that every client that measures is sent.
        time: The training on the virtual clock; None without a clock or a training.
    """

    down: Mapping[int, int] = field(default_factory=dict)
    up: Mapping[int, int] = field(default_factory=dict)
    news: int = 0
    measured: int = 0
    time: TrainingTime | None = None

    def traffic(self, measuring: int) -> Traffic:
        """Returns the bytes by kind and direction.

        Args:
            measuring: Number of clients that measure the round.
        """
        return Counter(
            adapter_down=sum(self.down.values()) + measuring * self.news,
            adapter_up=sum(self.up.values()),
            evaluation_down=measuring * self.measured,
        )


def rounds_of_adapters(parties: Parties, clock: Clock | None = None) -> list[RoundOfAdapters]:
    """Returns the adapters' traffic of each round; the first entry is the evaluation before the first round.

    Args:
        parties: The parties of a run.
        clock: The virtual clock of the run, which decides who is absent and who comes too late; None if nobody is.

    Raises:
        InputError: The strategy cannot be made, or fails.

    Example:
        >>> from fedsplit.settings.config import Config
        >>> parties = Parties(Config(rounds=2, clients=3))
        >>> rounds = rounds_of_adapters(parties)
        >>> [sum(entry.down.values()) > 0 for entry in rounds]  # all begin with adapters that they know
        [False, False, True]
    """
    config = parties.config
    with undisturbed(config.seed), tempfile.TemporaryDirectory() as folder:
        server = _Server(parties, Path(folder), clock)
        rounds = [server.to_measure()]
        for round in range(1, min(config.rounds, PLAYED) + 1):
            rounds.append(server.play(round))
    for round in range(PLAYED + 1, config.rounds + 1):
        # Strategies such as RoLoRA train factors A and B in turn. `PLAYED` is even, so that an odd round repeats an
        # odd one.
        earlier = rounds[PLAYED - round % 2]
        rounds.append(earlier)
    return rounds


class _Server:
    """The server's state between rounds."""

    def __init__(self, parties: Parties, folder: Path, clock: Clock | None) -> None:
        self._parties = parties
        self._clock = clock
        self._config = parties.config
        self._shapes: dict[str, torch.Size] = {}  # of tensors that have a stand-in
        self._noise: dict[torch.Size, Tensor] = {}
        strategy = load_strategy(self._config.strategy, self._config.strategy_options, strategy_defaults(self._config))
        self._aggregation: Aggregation = make_aggregation(strategy, self._config)
        parts = {kind: self._begun(parties.adapters([kind])) for kind in ("bottom", "trunk", "top")}
        # Without a gradient, the bottom's adapters stay as they are, and are known to all.
        self._unchanged = frozenset() if parties.schedule.returns_gradient else frozenset(parts["bottom"].tensors)
        self._ledger = AdapterLedger(self._config, self._aggregation.traits, parts, folder, folder)
        self._adapters = self._ledger.start
        self._codec: AdapterCodec | None = None
        # Raw tensors are counted by their sizes alone, and stand-ins suffice. A codec must see values.
        if self._config.adapter.codec != "raw":
            self._codec = AdapterCodec(self._config.adapter.codec, self._config.seed, self._ledger.rule.crossing)
        names = [f"client {client}" for client in range(self._config.clients)]
        self._roster = InventedRoster([ClientNode(number + 1, name) for number, name in enumerate(names)])

    def _begun(self, shapes: Adapters) -> Adapters:
        """Returns adapters as training begins: factors B are zero, other tensors random."""
        tensors = {}
        for name, tensor in shapes.tensors.items():
            factor = factor_of(name)
            if factor is None:  # the shape is remembered, and the tensor replaced by one value
                self._shapes[name] = tensor.shape
                tensors[name] = torch.ones((1,) * tensor.ndim)
            else:
                tensors[name] = torch.zeros(tensor.shape) if factor == "B" else torch.randn(tensor.shape) / 100
        return shapes.with_tensors(tensors)

    def _bytes(self, tensors: Mapping[str, Tensor]) -> int:
        """Returns the serialised bytes of tensors, some of which are stand-ins."""
        # `expand` takes no memory.
        whole = {}
        for name, tensor in tensors.items():
            whole[name] = tensor.expand(self._shapes.get(name, tensor.shape))
        return serialised_bytes(whole)

    def _bytes_down(self, client: int, assignment: Assignment, round: int) -> int:
        """Returns the bytes of the adapters that a client is sent."""
        if self._codec is None:
            return self._bytes(self._ledger.lacking(client, assignment))
        crossing = self._in_full(self._ledger.crossing(assignment))
        return serialised_bytes(self._codec.encode_values(crossing, client, round))

    def _bytes_up(self, update: ClientUpdate, names: Iterable[str], round: int) -> int:
        """Returns the bytes of the adapters that a client sends.

        Args:
            update: Update of the client.
            names: Names of the tensors that cross.
            round: Number of the round.
        """
        trained = {name: update.adapters.tensors[name] for name in names}
        if self._codec is None:
            return self._bytes(trained)
        # `_update` always sets the adapters that were given.
        assert update.given is not None
        given = {name: update.given.tensors[name] for name in trained}
        changes = self._codec.encode_changes(self._in_full(trained), self._in_full(given), update.client, round)
        return serialised_bytes(changes)

    def _in_full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns tensors with random values of the true shape in place of stand-ins."""
        full = {}
        for name, tensor in tensors.items():
            full[name] = torch.randn(self._shapes[name]) if name in self._shapes else tensor
        return full

    def play(self, round: int) -> RoundOfAdapters:
        """Plays a round."""
        ledger = self._ledger
        assigned = self._aggregation.assign(round, self._adapters, self._roster)
        unavailable = []
        if self._clock is not None:
            unavailable = sorted(self._clock.virtual.unavailable(round, sorted(assigned)))
        down: dict[int, int] = {}
        up: dict[int, int] = {}
        updates = {}
        # Sorted, since invented updates draw random numbers, and a set has no order.
        for client in sorted(assigned.keys() - {*unavailable}):
            assignment = assigned[client]
            task = assignment.task
            control = ledger.rule.crosses(task.control) if task.control is not None else {}
            down[client] = self._bytes_down(client, assignment, round) + self._bytes(control)
            update = self._update(client, assignment)
            updates[client] = update
            crossing = ledger.rule.crosses(assignment.adapters.tensors)
            returned = ledger.rule.returned(crossing, task)
            sent_control = {name: update.control[name] for name in returned if name in update.control}
            up[client] = self._bytes_up(update, returned, round) + self._bytes(sent_control)
        time = None if self._clock is None else self._clock.training(round, down, up, unavailable)
        # Updates that come too late have crossed, so that their bytes count. The server does not use them.
        for client in () if time is None else (*time.late, *time.surplus):
            del updates[client]
        for client in updates:
            ledger.accept(client, round, assigned[client])
        self._aggregate(round, [*updates.values()])
        return replace(self.to_measure(), down=down, up=up, time=time)

    def _aggregate(self, round: int, updates: list[ClientUpdate]) -> None:
        """Lets the strategy aggregate updates."""
        # As in a run: without updates nothing is aggregated, and no change of base weights is news to clients.
        if not updates and not self._aggregation.traits.idles:
            self._ledger.fold(round, {})
            return
        replies = [without_tensors(messages.trained(update, (), Score(), peak_memory=0)) for update in updates]
        result = self._aggregation.aggregate(round, self._adapters, updates, replies)
        self._ledger.fold(round, result.folded)
        self._adapters = result.with_tensors(result.tensors)

    def to_measure(self) -> RoundOfAdapters:
        """Returns what a client that measures is sent."""
        news = serialised_bytes(pack_changes(self._ledger.news))
        crossing = self._ledger.rule.crosses(self._adapters.tensors)
        return RoundOfAdapters(news=news, measured=self._bytes(crossing))

    def _update(self, client: int, assignment: Assignment) -> ClientUpdate:
        """Returns an invented update, in which every trained tensor has changed a little."""
        given = assignment.adapters
        personal = self._aggregation.traits.personal
        shared = {name: tensor for name, tensor in given.tensors.items() if not stays(name, personal)}
        trained = dict(shared)
        for name, tensor in shared.items():
            if assignment.task.teaches(name) and name not in self._unchanged:
                trained[name] = tensor + self._change(tensor.shape, client)
        control = {}
        for name, tensor in (assignment.task.control or {}).items():
            control[name] = self._change(tensor.shape, client)
        # Equal counts for all clients: they weigh the updates, and decide about no byte.
        return ClientUpdate(
            client,
            given.with_tensors(trained),
            examples=4,
            tokens=64,
            loss=1.0,
            weight=4.0,
            given=given.with_tensors(shared),
            control=control,
        )

    def _change(self, shape: torch.Size, client: int) -> Tensor:
        """Returns a small random tensor, linearly independent of those of other clients.

        Values are drawn once for each shape, and shifted for each client: millions of draws would take seconds.
        """
        if shape not in self._noise:
            self._noise[shape] = torch.randn(shape) / 100
        return self._noise[shape].roll(_SHIFT * client)
