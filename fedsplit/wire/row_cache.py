"""Cache of what the examples of each client were decoded to, within a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedsplit.wire.codecs import Role

Rows = Mapping[int, Tensor]
"""Decoded rows (T, D) by the number of the example. The example that was used least recently comes first."""


@dataclass
class _Sender:
    """Rows of one client in one role.

    Attributes:
        start: Rows at the end of the last round that counted.
        before: Rows before the present batch.
        now: Rows of the present batch, with the number of the micro-batch.
        place: Round, attempt, step and batch of the present batch; None before the first batch.
    """

    start: Rows = field(default_factory=dict)
    before: Rows = field(default_factory=dict)
    now: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    place: tuple[int, int, int, int] | None = None


class RowCache:
    """Rows of one kind and direction, by client and example.

    Sender and receiver have a cache each, with equal rows. All micro-batches of a batch find the rows from before the
    batch, so that neither their order nor a repetition matters. Rows leave the cache between two batches: both sides
    know the same rows then.

    As with `fedsplit.wire.codecs.CodecMemory`, each attempt at a round begins with the rows at the end of the client's
    last round that counted, and evaluations neither find nor leave rows.

    Example:
        >>> import torch
        >>> from fedsplit.wire.packets import StepKey
        >>> cache = RowCache(budget=8)
        >>> first, second = (Role("activation", "up", StepKey(round=1, client=0, step=step)) for step in (0, 1))
        >>> cache.set_after(first, {7: torch.zeros(1, 1), 9: torch.ones(1, 1)})
        >>> list(cache.before(first)), list(cache.before(second))
        ([], [7, 9])
        >>> cache.set_after(second, {3: torch.ones(1, 1)})
        >>> list(cache.before(Role("activation", "up", StepKey(round=1, client=0, step=2))))
        [9, 3]
    """

    def __init__(self, budget: int) -> None:
        """Starts without rows.

        Args:
            budget: Most bytes of the rows of a client.
        """
        self._budget = budget
        self._senders: dict[tuple[str, str, int], _Sender] = {}

    def before(self, role: Role) -> Rows:
        """Returns the rows of a client before a batch; none in evaluations."""
        sender = self._sender_at(role)
        return {} if sender is None else sender.before

    def set_after(self, role: Role, rows: Rows) -> None:
        """Sets rows of a micro-batch, as the receiver has decoded them."""
        sender = self._sender_at(role)
        if sender is None:
            return
        for example, values in rows.items():
            micro, _ = sender.now.get(example, (0, values))
            # A small data set may be passed twice in one batch. The last micro-batch counts, whichever came first.
            if role.key.micro >= micro:
                sender.now[example] = role.key.micro, values

    def _sender_at(self, role: Role) -> _Sender | None:
        """Returns the rows of a role's client, brought to the batch of the role; None for an evaluation or the past."""
        if not role.training:
            return None
        sender = self._senders.setdefault((role.kind, role.direction, role.client), _Sender())
        place = role.key.place
        if sender.place is not None and place < sender.place:  # a packet that came late
            return None
        if place != sender.place:
            same_attempt = sender.place is not None and place[:2] == sender.place[:2]
            sender.before = self._after(sender) if same_attempt else sender.start
            sender.now = {}
            sender.place = place
        return sender

    def _after(self, sender: _Sender) -> Rows:
        """Returns the rows after the present batch, within the budget."""
        # In the order of their numbers: micro-batches may come in another order on the other side.
        newest = {example: sender.now[example][1] for example in sorted(sender.now)}
        rows = {example: values for example, values in sender.before.items() if example not in newest}
        rows |= newest
        size = sum(values.nbytes for values in rows.values())
        for example in list(rows):
            if size <= self._budget:
                break
            size -= rows.pop(example).nbytes
        return rows

    def states(self) -> dict[int, dict[str, Tensor]]:
        """Returns the newest rows by client and name: kind, direction, place in the order of use, and example."""
        states: dict[int, dict[str, Tensor]] = {}
        for (kind, direction, client), sender in self._senders.items():
            rows = sender.start if sender.place is None else self._after(sender)
            for order, (example, values) in enumerate(rows.items()):
                states.setdefault(client, {})[f"{kind}/{direction}/{order}/{example}"] = values
        return states

    def restore(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Replaces all rows by an earlier result of `states`."""
        self._senders = {}
        for client, by_name in states.items():
            # In the order of use, which decides which rows leave first.
            in_order = sorted(_split_names(by_name), key=lambda item: item[0][2])
            for (kind, direction, _, example), values in in_order:
                sender = self._senders.setdefault((kind, direction, client), _Sender())
                sender.start = {**sender.start, example: values}


def _split_names(by_name: Mapping[str, Tensor]) -> Iterator[tuple[tuple[str, str, int, int], Tensor]]:
    """Yields kind, direction, place in the order of use, and example of each name, with the rows."""
    for name, values in by_name.items():
        kind, direction, order, example = name.split("/")
        yield (kind, direction, int(order), int(example)), values
