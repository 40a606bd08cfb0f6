"""Which adapters cross between server and clients, which stay at a client, and which are drawn from a seed.

Server and clients build the same rule from the same facts. So a message need not list the tensors left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.factors import select
from fedsplit.updates import Adapters, Task, factor_of, fresh_factor


@dataclass(frozen=True)
class TravelRule:
    """Names of the adapter tensors that may cross, and of those that may not.

    The trunk's tensors are in neither set, since they are not at the clients.

    Attributes:
        personal: Names of tensors that never leave a client: those of unshared parts, and factors that the strategy
            keeps at the client.
        crossing: Names of tensors that a message may hold.

    Example:
        >>> import torch
        >>> from fedsplit.updates import Adapters, Layer
        >>> names = ("h.0.lora_A.weight", "h.0.lora_B.weight")
        >>> bottom = Adapters({name: torch.zeros(2, 2) for name in names}, {"h.0": Layer(1.0, False)})
        >>> rule = TravelRule.of({"bottom": bottom}, share=("bottom",), factors="B")
        >>> sorted(rule.crossing), sorted(rule.personal)
        (['h.0.lora_A.weight'], ['h.0.lora_B.weight'])
    """

    personal: frozenset[str]
    crossing: frozenset[str]

    @classmethod
    def of(cls, parts: Mapping[str, Adapters], share: Collection[str], factors: Collection[str]) -> TravelRule:
        """Makes the rule for the adapters of bottom and top.

        Args:
            parts: Adapters of bottom and top, by part.
            share: Parts whose adapters are aggregated.
            factors: Factors that stay at the clients, such as "B".
        """
        names: set[str] = set()
        personal: set[str] = set()
        for part, adapters in parts.items():
            names |= adapters.tensors.keys()
            for name in adapters.tensors:
                if part not in share or stays(name, factors):
                    personal.add(name)
        return cls(frozenset(personal), frozenset(names - personal))

    def crosses(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors that a message may hold."""
        return select(tensors, self.crossing)

    def returned(self, names: Iterable[str], task: Task) -> set[str]:
        """Returns the names of the tensors that a client sends back: they cross, and train under the task."""
        return {name for name in names if name in self.crossing and task.teaches(name)}

    def untrained(self, names: Iterable[str], task: Task) -> set[str]:
        """Returns the names of the tensors that a client still holds after a round: they cross, and do not train."""
        return {name for name in names if name in self.crossing and not task.teaches(name)}


def stays(name: str, factors: Collection[str]) -> bool:
    """Returns True for a factor that stays at the client."""
    factor = factor_of(name)
    return factor is not None and factor in factors


def is_drawn(name: str, drawn: int | None) -> bool:
    """Returns True for a tensor that the client draws from a seed, so that nobody sends the tensor."""
    return drawn is not None and factor_of(name) is not None


def draw(start: Adapters, drawn: int | None) -> dict[str, Tensor]:
    """Returns fresh factors from a seed.

    Args:
        start: Adapters with the names and shapes, at the client's rank.
        drawn: Seed of the draw; None for no factors.

    Returns:
        Random factors A, and factors B of zeros.
    """
    if drawn is None:
        return {}
    factors = {}
    for name, tensor in start.tensors.items():
        if factor_of(name) == "A":
            factors[name] = fresh_factor(name, tensor.shape, drawn)
        elif factor_of(name) == "B":
            factors[name] = torch.zeros_like(tensor)  # as LoRA begins: the product is 0
    return factors


def is_held(tensor: Tensor, held: Tensor) -> bool:
    """Returns True if a client holds a tensor already, so that the tensor need not be sent."""
    return held.shape == tensor.shape and torch.equal(held, tensor)
