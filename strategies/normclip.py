"""Clipping of each client's change to a norm, before any other strategy.

Rule: theta_i <- given_i + min(1, C / ||theta_i - given_i||) (theta_i - given_i), with given_i what client i started
from and the norm taken over all that it sends, as one vector; then the rule of the strategy `around`.
Needs: what that strategy needs, and every client's own adapters: so not under secure aggregation, even around a
strategy that needs sums only. Costs: those of that strategy. It bounds what one client can do to a sum, where C is
near the norm of an honest change (1911.07963); the server adds no noise. A change within the norm is
handed on to the bit. SCAFFOLD's control variates are handed on as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

import strategies
from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, Traits


class NormClip:
    """Another strategy that gets to see clipped changes only."""

    def __init__(
        self,
        norm: float = 1.0,
        around: str = "fedavg",
        seed: int | None = None,
        clients: int | None = None,
        **options: Any,
    ) -> None:
        """Makes the strategy around which it works.

        Args:
            norm: C, the greatest norm that a client's change may have.
            around: The other strategy, by its name in `STRATEGIES`.
            seed: The run's, for the other; None: the other's own default.
            clients: How many there are, for the other; None: the other's own default.
            options: Keyword arguments of the other.
        """
        if not 0 < norm < math.inf:
            raise ValueError(f"norm is {norm}; it must be more than 0")
        if around == "normclip":
            raise ValueError("normclip around normclip is normclip with the lesser norm")
        self.norm = norm
        known = {name: value for name, value in (("seed", seed), ("clients", clients)) if value is not None}
        self.inner = strategies.make(around, known, **options)
        self.traits = replace(getattr(self.inner, "traits", Traits()), linear=False)

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """The other's state: clipping remembers nothing."""
        return self.inner.init(adapters)

    def broadcast(self, state: Mapping[str, Tensor], adapters: Adapters, client: ClientInfo) -> Assignment | None:
        """The other's."""
        own = getattr(self.inner, "broadcast", None)
        return own(state, adapters, client) if own else Assignment(adapters.with_rank(client.rank))

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Clips, and leaves the rest to the other.

        Raises:
            ValueError: The other refuses the updates.
        """
        return self.inner.aggregate(state, adapters, [clipped(update, adapters, self.norm) for update in updates])


def clipped(update: ClientUpdate, adapters: Adapters, norm: float) -> ClientUpdate:
    """The update with its change scaled to a norm if it is greater.

    Args:
        update: Of any ranks; its `given` is of the same.
        adapters: What it started from, where `given` does not say.
        norm: The greatest norm.
    """
    before = {name: (update.given or adapters).tensors[name].double() for name in update.adapters.tensors}
    change = {name: tensor.double() - before[name] for name, tensor in update.adapters.tensors.items()}
    size = math.sqrt(math.fsum(float((tensor**2).sum()) for tensor in change.values()))
    if size <= norm:
        return update
    tensors = {
        name: (before[name] + norm / size * change[name]).to(tensor.dtype)
        for name, tensor in update.adapters.tensors.items()
    }
    return replace(update, adapters=update.adapters.with_tensors(tensors))
