"""NormClip: clips the norm of each client's change, then applies any other strategy.

Rule:
    theta_i <- given_i + min(1, C / ||theta_i - given_i||) (theta_i - given_i)
    then the rule of the strategy `around`
given_i are the adapters that client i started from. The norm runs over all tensors that the client sends, as one
vector.

Needs: as the other strategy; and every client's own adapters, so no secure aggregation, even around a strategy that
needs sums only.
Costs: as the other strategy.
Clipping bounds the effect of one client on a sum if C is near the norm of an honest change (1911.07963). The server
adds no noise. A change within the norm passes to the bit. SCAFFOLD's control variates pass as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import strategies
from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, State, Traits


class NormClip:
    """Passes clipped changes to another strategy.

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
        """Makes the other strategy.

        Args:
            norm: C, the largest norm of a client's change.
            around: Name of the other strategy in `STRATEGIES`.
            seed: The run's seed, passed to the other strategy; None: its own default.
            clients: Number of clients, passed to the other strategy; None: its own default.
            options: Keyword arguments of the other strategy.

        Raises:
            ValueError: norm is not positive, or the other strategy is unknown, NormClip itself, or lacks an option.
        """
        if not 0 < norm < math.inf:
            raise ValueError(f"norm is {norm}; it must be more than 0")
        if around == "normclip":
            raise ValueError("normclip around normclip is normclip with the lesser norm")
        self.norm = norm

        facts_of_run = {"seed": seed, "clients": clients}
        defaults = {name: value for name, value in facts_of_run.items() if value is not None}
        self.inner = strategies.make(around, defaults, **options)
        self.traits = replace(getattr(self.inner, "traits", Traits()), linear=False)

    def init(self, adapters: Adapters) -> State:
        """Returns the state of the other strategy: clipping remembers nothing."""
        return self.inner.init(adapters)

    def broadcast(self, state: State, adapters: Adapters, client: ClientInfo) -> Assignment | None:
        """Returns the assignment by the other strategy."""
        broadcast = getattr(self.inner, "broadcast", None)
        if broadcast is None:
            return Assignment(adapters.with_rank(client.rank))
        return broadcast(state, adapters, client)

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Clips every update and passes all to the other strategy.

        Raises:
            ValueError: The other strategy refuses the updates.
        """
        return self.inner.aggregate(state, adapters, [clipped(update, adapters, self.norm) for update in updates])


def clipped(update: ClientUpdate, adapters: Adapters, norm: float) -> ClientUpdate:
    """Returns the update with its change scaled down to a norm; an update within the norm is returned itself.

    Args:
        update: A client's update, of any ranks; its `given` has the same ranks.
        adapters: Adapters that the client started from if the update does not hold `given`.
        norm: The largest norm.

    Example:
        >>> from strategies.example import lora
        >>> update = ClientUpdate(0, lora(A=[[3, 4]], B=[[0]]), examples=1)
        >>> clipped(update, lora(A=[[0, 0]], B=[[0]]), norm=1.25).adapters.tensors["layer.lora_A.weight"].tolist()
        [[0.75, 1.0]]
    """
    given = (update.given or adapters).tensors
    before = {name: given[name].double() for name in update.adapters.tensors}
    change = {name: tensor.double() - before[name] for name, tensor in update.adapters.tensors.items()}
    # One norm over all tensors, as if the change were one vector.
    squares = [float((tensor**2).sum()) for tensor in change.values()]
    change_norm = math.sqrt(math.fsum(squares))
    if change_norm <= norm:
        return update

    factor = norm / change_norm
    tensors = {}
    for name, tensor in update.adapters.tensors.items():
        shortened = before[name] + factor * change[name]
        tensors[name] = shortened.to(tensor.dtype)
    return replace(update, adapters=update.adapters.with_tensors(tensors))
