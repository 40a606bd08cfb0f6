"""FedBuff (2106.06639): asynchronous averaging. The server steps once K changes of any age have arrived.

Rule, once the buffer holds K changes or more:
    theta <- theta + eta * sum_i (w_i / sum_j w_j) (theta_i - given_i) / sqrt(1 + tau_i)
given_i are the adapters at the start of client i. tau_i, the staleness, counts the server's steps since client i was
asked. For equal weights, w_i / sum_j w_j is the paper's 1/K. The w are absolute (numbers of examples, or the values in
`--weights`), so that changes from different rounds compare.

Asynchrony is simulated in rounds, and is as deterministic as any run:
- A client of delay d trains on the adapters of the round in which the server asks. The client's change arrives d - 1
  rounds later. Until the arrival, the client rests. After the arrival, the server may ask again, even if the change
  still waits in the buffer.
- All changes in the buffer at the end of a round make one step.
- If all clients would rest in the next round, the clock moves on to the next arrival. If only the sampled clients of a
  round rest, the round counts, and changes that arrive by the end of the round make a step.

Needs: equal ranks; the change of every single client.
Costs: FedAvg's traffic for the clients that do not rest. The server keeps every pending change, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, State, Traits, weighted
from strategies.server_optimiser import add_step, check_options


@dataclass(frozen=True)
class Pending:
    """A client's change before the server's step: still on the way, or waiting in the buffer.

    Attributes:
        client: Number of the client.
        asked: Round in which the client was asked.
        arrives: Round of the arrival. The change arrives at the end of the round.
        version: Number of server steps before the client was asked.
        weight: Weight of the client, not normalised.
        change: theta_i - given_i by exported name, in float64.
    """

    client: int
    asked: int
    arrives: int
    version: int
    weight: float
    change: Mapping[str, Tensor]

    def as_state(self) -> dict[str, Tensor]:
        """Returns the change as tensors of a state. `_pending` is the inverse."""
        key = f"{self.client}.{self.asked}"
        # A state is saved as tensors by name; float64 holds the whole numbers exactly.
        facts = [self.arrives, self.version, self.weight]
        tensors = {f"facts.{key}": torch.tensor(facts, dtype=torch.float64)}
        for name, tensor in self.change.items():
            tensors[f"pending.{key}.{name}"] = tensor
        return tensors


class FedBuff:
    """Makes a step with all buffered changes. The staler a change, the smaller the weight.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[0, 0]], B=[[0]])
        >>> clients = [lora(A=[[2, 0]], B=[[0]]), lora(A=[[0, 8]], B=[[0]])]
        >>> slow_second_client = FedBuff(delays="1,2")
        >>> A, _ = one_round(slow_second_client, start, clients).factors("layer")
        >>> A.tolist()  # the change of the second client arrives one round later
        [[2.0, 0.0]]
    """

    traits = Traits(idles=True)

    def __init__(
        self,
        delays: str | int = "1",
        buffer: int = 0,
        eta: float = 1.0,
        clients: int = 0,
    ) -> None:
        """Sets the delays and the buffer.

        Args:
            delays: Delays of clients in rounds, assigned cyclically by client number: "1,1,2,4". A change of delay 1
                arrives in the round in which the client was asked.
            buffer: K, the number of changes for a step; 0: all changes at the end of a round, at least one.
            eta: Step size of the server.
            clients: Number of clients in the federation; 0: the clients in the buffer or in the round.

        Raises:
            ValueError: An option is out of range.
        """
        check_options(eta=eta)
        self.delays = _parse_delays(delays)
        for name, value in (("buffer", buffer), ("clients", clients)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more")
        self.buffer = buffer
        self.eta = eta
        self.clients = clients

    def init(self, adapters: Adapters) -> State:
        """Returns an empty buffer, at round 0 and step 0."""
        return _state(0, 0, [])

    def broadcast(self, state: State, adapters: Adapters, client: ClientInfo) -> Assignment | None:
        """Sends the adapters, or returns None for a client with a change on the way."""
        now = int(state["round"])
        for change in _pending(state):
            is_on_the_way = change.arrives >= now
            if change.client == client.client and is_on_the_way:
                return None
        return Assignment(adapters.with_rank(client.rank))

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Adds the new changes to the pending changes, and makes a step after enough arrivals.

        Raises:
            ValueError: No client trained on any example, and no change is pending either.
        """
        now = int(state["round"])
        version = int(state["version"])

        pending = _pending(state)
        has_examples = any(_weight(update) > 0 for update in updates)
        if has_examples or (updates and not pending):  # in the second case `weighted` raises
            trained, _ = weighted(updates)
            for update in trained:
                change = self._pending_change(update, adapters, now, version)
                pending.append(change)
        # A fixed order makes the sum independent of the order of arrival.
        pending.sort(key=lambda change: (change.client, change.asked))

        # If every client rests, the clock moves on to the next arrival.
        now = max(now, self._next_arrival(pending, now))
        arrived = [change for change in pending if change.arrives <= now]
        needed = max(1, self.buffer)
        if len(arrived) < needed:
            unchanged = adapters.with_tensors(adapters.tensors)  # nothing to fold again from an earlier round
            return _state(now + 1, version, pending), unchanged

        on_their_way = [change for change in pending if change.arrives > now]
        new_state = _state(now + 1, version + 1, on_their_way)
        step = self._step(arrived, version)
        return new_state, add_step(adapters, step)

    def _pending_change(
        self,
        update: ClientUpdate,
        adapters: Adapters,
        now: int,
        version: int,
    ) -> Pending:
        """Returns an update as a pending change with the client's delay."""
        given = (update.given or adapters).tensors
        change = {}
        for name, tensor in update.adapters.tensors.items():
            change[name] = tensor.double() - given[name].double()
        delay = self.delays[update.client % len(self.delays)]
        return Pending(
            client=update.client,
            asked=now,
            arrives=now + delay - 1,
            version=version,
            weight=_weight(update),
            change=change,
        )

    def _next_arrival(self, pending: Sequence[Pending], now: int) -> int:
        """Returns the first round after which the server can ask some client.

        The result is the current round if a client has no pending change. If the number of clients is unknown (0), the
        clients with pending changes count as all clients.
        """
        last_arrivals: dict[int, int] = {}
        for change in pending:
            known = last_arrivals.get(change.client, 0)
            last_arrivals[change.client] = max(known, change.arrives)
        if len(last_arrivals) < self.clients:
            return now
        return min(last_arrivals.values())

    def _step(self, arrived: Sequence[Pending], version: int) -> dict[str, Tensor]:
        """Returns eta times the weighted mean of the changes, each divided by sqrt(1 + tau)."""
        total_weight = math.fsum(change.weight for change in arrived)
        step: dict[str, Tensor] = {}
        for change in arrived:
            staleness = version - change.version
            discount = math.sqrt(1 + staleness)
            factor = self.eta * change.weight / total_weight / discount
            for name, tensor in change.change.items():
                so_far = step.get(name, torch.zeros_like(tensor))
                step[name] = so_far + factor * tensor
        return step


def _parse_delays(delays: str | int) -> list[int]:
    """Returns delays as numbers.

    Raises:
        ValueError: A delay is no whole number from 1.

    Example:
        >>> _parse_delays("1,1,2,4"), _parse_delays(3)
        ([1, 1, 2, 4], [3])
    """
    try:
        parsed = [int(delay) for delay in str(delays).split(",")]
    except ValueError:
        parsed = []
    if min(parsed, default=0) < 1:
        raise ValueError(f'delays is {delays!r}; it must be whole numbers from 1, as in "1,1,2,4"')
    return parsed


def _weight(update: ClientUpdate) -> float:
    """Returns the weight of an update, not normalised."""
    if update.weight is None:
        return float(update.examples)
    return float(update.weight)


def _state(round: int, version: int, pending: Sequence[Pending]) -> dict[str, Tensor]:
    """Returns a state of this strategy as tensors."""
    state = {"round": torch.tensor(round), "version": torch.tensor(version)}
    for change in pending:
        state |= change.as_state()
    return state


def _pending(state: State) -> list[Pending]:
    """Returns the pending changes in a state."""
    changes: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("pending."):
            _, client, asked, exported = name.split(".", 3)  # an exported name has dots, too
            key = int(client), int(asked)
            change = changes.setdefault(key, {})
            change[exported] = tensor

    pending = []
    for (client_number, asked_in), change in changes.items():
        arrives, version, weight = state[f"facts.{client_number}.{asked_in}"].tolist()
        pending.append(
            Pending(
                client=client_number,
                asked=asked_in,
                arrives=int(arrives),
                version=int(version),
                weight=weight,
                change=change,
            )
        )
    return pending
