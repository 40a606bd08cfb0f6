"""NormClip: clips the norm of each client's change, then applies an inner strategy.

Rule:
    theta_i <- given_i + min(1, C / ||theta_i - given_i||) (theta_i - given_i)
    then the rule of the inner strategy (`around`)
given_i are the adapters at the start of client i. The norm runs over all tensors of the client, as one vector.

Needs: as the inner strategy; and the adapters of every single client, so no secure aggregation, even around a strategy
of sums.
Costs: as the inner strategy.
Clipping bounds the effect of one client on a sum if C is near the norm of an honest change (1911.07963). The server
adds no noise. A change within the norm passes to the bit. SCAFFOLD's control variates pass unclipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import strategies
from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, State, Traits


class NormClip:
    """Passes clipped changes to an inner strategy.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[0, 0]], B=[[0]])
        >>> client = lora(A=[[3, 4]], B=[[0]])  # a change of norm 5
        >>> A, _ = one_round(NormClip(norm=2.5, around="fedavg"), start, [client]).factors("layer")
        >>> A.tolist()
        [[1.5, 2.0]]
    """

    def __init__(
        self,
        norm: float = 1.0,
        around: str = "fedavg",
        seed: int | None = None,
        clients: int | None = None,
        **options: Any,
    ) -> None:
        """Makes the inner strategy.

        Args:
            norm: C, the largest norm of a client's change.
            around: Name of the inner strategy in `STRATEGIES`.
            seed: Seed of the run, for the inner strategy; None for the default of the inner strategy.
            clients: Number of clients, for the inner strategy; None for the default of the inner strategy.
            options: Keyword arguments for the inner strategy.

        Raises:
            ValueError: norm is not positive, or the inner strategy is unknown, NormClip itself, or lacks an option.
        """
        if not 0 < norm < math.inf:
            raise ValueError(f"norm is {norm}; it must be more than 0")
        if around == "normclip":
            raise ValueError("normclip around normclip is normclip with the lesser norm")
        self.norm = norm

        defaults = {}  # without None, which would replace the defaults of the inner strategy
        if seed is not None:
            defaults["seed"] = seed
        if clients is not None:
            defaults["clients"] = clients
        self.inner = strategies.make(around, defaults, **options)
        inner_traits = getattr(self.inner, "traits", Traits())
        self.traits = replace(inner_traits, linear=False)  # a clipped sum is no linear function of the updates

    def init(self, adapters: Adapters) -> State:
        """Returns the state of the inner strategy: clipping remembers nothing."""
        return self.inner.init(adapters)

    def broadcast(self, state: State, adapters: Adapters, client: ClientInfo) -> Assignment | None:
        """Returns the assignment of the inner strategy."""
        broadcast = getattr(self.inner, "broadcast", None)
        if broadcast is None:
            return Assignment(adapters.with_rank(client.rank))
        return broadcast(state, adapters, client)

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Clips every update, and passes all updates to the inner strategy.

        Raises:
            ValueError: The inner strategy refuses the updates.
        """
        within_norm = [clipped(update, adapters, self.norm) for update in updates]
        return self.inner.aggregate(state, adapters, within_norm)


def clipped(update: ClientUpdate, adapters: Adapters, norm: float) -> ClientUpdate:
    """Returns the update with the change scaled down to a norm. An update within the norm is returned itself.

    Args:
        update: A client's update, of any ranks. `given` in the update has the same ranks.
        adapters: Adapters at the start of the client, for an update without `given`.
        norm: The largest norm.

    Example:
        >>> from strategies.example import lora
        >>> update = ClientUpdate(0, lora(A=[[3, 4]], B=[[0]]), examples=1)
        >>> clipped(update, lora(A=[[0, 0]], B=[[0]]), norm=1.25).adapters.tensors["layer.lora_A.weight"].tolist()
        [[0.75, 1.0]]
    """
    before = (update.given or adapters).in_float64().tensors
    change = {}
    squares = []
    for name, tensor in update.adapters.tensors.items():
        change[name] = tensor.double() - before[name]
        square = (change[name] ** 2).sum()
        squares.append(float(square))
    # One norm over all tensors, as if the change were one vector.
    change_norm = math.sqrt(math.fsum(squares))
    if change_norm <= norm:
        return update

    factor = norm / change_norm
    tensors = {}
    for name, tensor in update.adapters.tensors.items():
        shortened = before[name] + factor * change[name]
        tensors[name] = shortened.to(tensor.dtype)
    adapters_within_norm = update.adapters.with_tensors(tensors)
    return replace(update, adapters=adapters_within_norm)
