"""The trace of a round: every message pair that crossed between a client and the trunk, with bytes and shapes.

The trunk keeps the trace (`fedsplit.trunk.answers`), so that no client reports its own traffic. A trace does not depend
on the order in which messages came: `settled` sorts it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward", "coefficient", "evaluation", "reference"]
"""Purpose of a message: forward and backward of a training step, clipping coefficient, held-out text, base model."""


@dataclass(frozen=True)
class Crossing:
    """One message of a client to the trunk, and the answer.

    Attributes:
        round: Number of the round.
        client: Number of the client.
        attempt: Number of times that the client began the round before.
        step: Number of the step in the round; for held-out text, number of the batch.
        batch: Number of the batch in the step.
        micro: Number of the micro-batch in the batch.
        kind: Purpose of the message.
        up: Bytes of the message.
        down: Bytes of the answer.
        rows: Sequences of the message; 0 for a coefficient.
        length: Positions of a sequence, virtual tokens included.
        learns: True if the trunk learns from the step.
        ends: True for the last part of a step.
        returns_gradient: True if the answer has a gradient for the client's bottom.
    """

    round: int
    client: int
    attempt: int
    step: int
    batch: int
    micro: int
    kind: Kind
    up: int
    down: int
    rows: int = 0
    length: int = 0
    learns: bool = True
    ends: bool = False
    returns_gradient: bool = False

    @property
    def place(self) -> tuple[int, int, int, int, str]:
        """Order of the messages of all clients, whatever the order of their arrival."""
        return self.client, self.step, self.batch, self.micro, self.kind


class Trace:
    """Keeps crossings from one call of `take` to the next.

    Example:
        >>> trace = Trace()
        >>> trace.add(Crossing(1, 0, 0, 0, 0, 0, "backward", up=8, down=4))
        >>> trace.add_to_last(down=2)
        >>> [crossing.down for crossing in trace.take()], trace.take()
        ([6], [])
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.crossings: list[Crossing] = []

    def add(self, crossing: Crossing) -> None:
        """Adds a crossing."""
        self.crossings.append(crossing)

    def add_to_last(self, down: int) -> None:
        """Adds bytes to the answer of the crossing that was added last."""
        last = self.crossings[-1]
        self.crossings[-1] = dataclasses.replace(last, down=last.down + down)

    def take(self) -> list[Crossing]:
        """Returns all crossings since the last call, and forgets them."""
        taken = self.crossings
        self.crossings = []
        return taken


def settled(
    crossings: Iterable[Crossing],
    round: int,
    clients: Collection[int],
) -> dict[int, list[Crossing]]:
    """Returns the crossings of each client's last attempt in a fixed order.

    Args:
        crossings: Crossings in any order.
        round: The round. Crossings of further rounds, as of clients that were given up, are left out.
        clients: Clients whose round counts. Crossings of further clients are left out.

    Example:
        >>> first = Crossing(1, 0, 0, 0, 0, 0, "forward", up=8, down=8)
        >>> again = dataclasses.replace(first, attempt=1)
        >>> settled([first, again], round=1, clients=[0]) == {0: [again]}
        True
    """
    by_client: dict[int, list[Crossing]] = {client: [] for client in sorted(clients)}
    for crossing in sorted(crossings, key=lambda crossing: crossing.place):
        if crossing.round == round and crossing.client in by_client:
            by_client[crossing.client].append(crossing)
    # A client that was started again repeats its round. Messages of the broken attempt would count twice.
    for client, own in by_client.items():
        last = max((crossing.attempt for crossing in own), default=0)
        by_client[client] = [crossing for crossing in own if crossing.attempt == last]
    return by_client


def joined_stages(stages: Sequence[Sequence[Crossing]]) -> tuple[Crossing, ...]:
    """Returns the crossings between clients and a trunk in stages.

    Hidden states enter at the first stage and leave at the last. Gradients enter at the last and leave at the first:
    the first stage sees them only after all stages above.

    Args:
        stages: Crossings of each stage, from the bottom to the top.
    """
    highest_by_place = {(crossing.place, crossing.attempt): crossing for crossing in stages[-1]}
    joined = []
    for lowest in stages[0]:
        highest = highest_by_place.get((lowest.place, lowest.attempt))
        if highest is None:  # the last message of a client that was lost has not passed all stages
            continue
        is_backward = lowest.kind == "backward"
        up = highest.up if is_backward else lowest.up
        down = lowest.down if is_backward else highest.down
        joined.append(dataclasses.replace(lowest, up=up, down=down))
    return tuple(joined)
