"""FedBuff (2106.06639): the server steps when K changes have arrived, however old they are.

Rule: theta <- theta + eta * sum_i (w_i / sum_j w_j) (theta_i - given_i) / sqrt(1 + tau_i) over the changes in the
buffer, as soon as they are K; tau_i is how many server steps were made since client i was asked. The paper weights
by 1/K, which this is with equal weights; the w are absolute (examples, or what `--weights` says), so that changes of
different rounds compare.
Asynchrony is simulated in rounds, and is as deterministic as any other run: a client of delay d trains on what it was
given in the round in which it was asked, and its change counts as arriving d - 1 rounds later. Until then it rests.
It is asked again then, even if its change waits in the buffer still. All changes in the buffer at the end of a
round make one step. Where all clients would rest in the next round, the clock goes on to the next arrival; where only
those rest that a round samples, the round counts, and what has arrived by its end makes a step.
Needs: equal ranks; every client's own change. Costs: FedAvg's traffic for those that do not rest; the server keeps
every change under way or waiting, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, Traits, counted
from strategies.server_optimiser import check, moved


@dataclass(frozen=True)
class Pending:
    """A change that is under way or waits in the buffer.

    Attributes:
        client: Whose.
        asked: The round in which it was asked.
        arrives: The round at whose end it is there.
        version: How many server steps had been made when it was asked.
        weight: What it counts beside others.
        change: theta_i - given_i by exported name, in float64.
    """

    client: int
    asked: int
    arrives: int
    version: int
    weight: float
    change: Mapping[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """As tensors of a state."""
        key = f"{self.client}.{self.asked}"
        facts = torch.tensor([self.arrives, self.version, self.weight], dtype=torch.float64)
        return {f"facts.{key}": facts, **{f"pending.{key}.{name}": tensor for name, tensor in self.change.items()}}


class FedBuff:
    """Steps on a buffer of changes, stale ones weighing less."""

    traits = Traits(idles=True)

    def __init__(self, delays: str | int = "1", buffer: int = 0, eta: float = 1.0, clients: int = 0) -> None:
        """Sets who is how slow.

        Args:
            delays: Rounds that clients take, dealt in turns by their numbers: "1,1,2,4". 1 arrives in the round in
                which it was asked.
            buffer: K, how many changes make a step; 0: whatever there is at the end of a round, one at least.
            eta: The server's step size.
            clients: How many clients the federation has; 0: those of whom the buffer or the round tells.
        """
        check(eta=eta)
        try:
            self.delays = [int(delay) for delay in str(delays).split(",")]
        except ValueError:
            self.delays = []
        if min(self.delays, default=0) < 1:
            raise ValueError(f'delays is {delays!r}; it must be whole numbers from 1, as in "1,1,2,4"')
        for name, value in (("buffer", buffer), ("clients", clients)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more")
        self.buffer, self.eta, self.clients = buffer, eta, clients

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """An empty buffer, no round and no step."""
        return _state(0, 0, [])

    def broadcast(self, state: Mapping[str, Tensor], adapters: Adapters, client: ClientInfo) -> Assignment | None:
        """The adapters, unless the client is still under way."""
        now = int(state["round"])
        if any(change.client == client.client and change.arrives >= now for change in _pending(state)):
            return None
        return Assignment(adapters.with_rank(client.rank))

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Sends the new changes on their way, and steps if enough have arrived.

        Raises:
            ValueError: No client has any example, and nothing is under way either.
        """
        now, version = int(state["round"]), int(state["version"])
        pending = _pending(state)
        if any(_weight(update) > 0 for update in updates) or (updates and not pending):
            pending += [self._sent(update, adapters, now, version) for update in counted(updates)[0]]
        pending.sort(key=lambda change: (change.client, change.asked))
        now = max(now, self._next_arrival(pending, now))
        arrived = [change for change in pending if change.arrives <= now]
        if len(arrived) < max(1, self.buffer):
            return _state(now + 1, version, pending), adapters.with_tensors(adapters.tensors)
        waiting = [change for change in pending if change.arrives > now]
        return _state(now + 1, version + 1, waiting), moved(adapters, self._step(arrived, version))

    def _sent(self, update: ClientUpdate, adapters: Adapters, now: int, version: int) -> Pending:
        """An update as a change under way."""
        before = (update.given or adapters).tensors
        return Pending(
            client=update.client,
            asked=now,
            arrives=now + self.delays[update.client % len(self.delays)] - 1,
            version=version,
            weight=_weight(update),
            change={name: t.double() - before[name].double() for name, t in update.adapters.tensors.items()},
        )

    def _next_arrival(self, pending: Sequence[Pending], now: int) -> int:
        """The next round after which a client could be asked; with N known, one that never answered could be now."""
        arrivals: dict[int, int] = {}
        for change in pending:
            arrivals[change.client] = max(arrivals.get(change.client, 0), change.arrives)
        return now if len(arrivals) < self.clients else min(arrivals.values())

    def _step(self, arrived: Sequence[Pending], version: int) -> dict[str, Tensor]:
        """The step size times the weighted sum of changes, each divided by the root of 1 + its staleness."""
        whole = math.fsum(change.weight for change in arrived)
        step: dict[str, Tensor] = {}
        for change in arrived:
            factor = self.eta * change.weight / whole / math.sqrt(1 + version - change.version)
            for name, tensor in change.change.items():
                step[name] = step.get(name, torch.zeros_like(tensor)) + factor * tensor
        return step


def _weight(update: ClientUpdate) -> float:
    """What an update counts, not divided by anything."""
    return float(update.examples if update.weight is None else update.weight)


def _state(round: int, version: int, pending: Sequence[Pending]) -> dict[str, Tensor]:
    """The state as tensors."""
    state = {"round": torch.tensor(round), "version": torch.tensor(version)}
    for change in pending:
        state |= change.named()
    return state


def _pending(state: Mapping[str, Tensor]) -> list[Pending]:
    """The changes that a state holds."""
    changes: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("pending."):
            _, client, asked, exported = name.split(".", 3)
            changes.setdefault((int(client), int(asked)), {})[exported] = tensor
    found = []
    for (number, round), change in changes.items():
        arrives, version, weight = state[f"facts.{number}.{round}"].tolist()
        found.append(Pending(number, round, int(arrives), int(version), weight, change))
    return found
