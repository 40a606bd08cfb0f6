"""The one rule for what travels: which adapters cross, which stay, and which are drawn from a seed.

The server and its clients build the same rule from the same facts, so that a message need not say what it lacks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.updates import Adapters, Task, factor_of, fresh_factor


@dataclass(frozen=True)
class TravelRule:
    """Names of adapter tensors by where they may go.

    Attributes:
        personal: Names that never leave their client: parts that are not shared, and factors that the strategy keeps
            at the client.
        crossing: Names that a message may hold. The trunk's are in neither set: they do not live at clients.

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
        """Sorts the adapters of the parts that live at clients.

        Args:
            parts: Adapters of bottom and top, by part.
            share: Parts whose adapters are aggregated.
            factors: Factors that stay with their clients, such as "B".
        """
        names = {name for adapters in parts.values() for name in adapters.tensors}
        unshared = {name for part, adapters in parts.items() if part not in share for name in adapters.tensors}
        personal = unshared | {name for name in names if stays(name, factors)}
        return cls(frozenset(personal), frozenset(names - personal))

    def crosses(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns those of some tensors that a message may hold."""
        return {name: tensor for name, tensor in tensors.items() if name in self.crossing}

    def returned(self, names: Iterable[str], task: Task) -> set[str]:
        """Returns those of some names that a client sends back: what crosses, and trains under the task."""
        return {name for name in names if name in self.crossing and task.teaches(name)}

    def untrained(self, names: Iterable[str], task: Task) -> set[str]:
        """Returns those of some names that cross and do not train, so that a client goes on holding them."""
        return {name for name in names if name in self.crossing and not task.teaches(name)}


def stays(name: str, factors: Collection[str]) -> bool:
    """Returns whether a tensor is a factor that stays with its client."""
    factor = factor_of(name)
    return factor is not None and factor in factors


def is_drawn(name: str, drawn: int | None) -> bool:
    """Returns whether a client draws a tensor itself, so that it need not be sent."""
    return drawn is not None and factor_of(name) is not None


def draw(start: Adapters, drawn: int | None) -> dict[str, Tensor]:
    """Returns the factors that a client draws itself.

    Args:
        start: Adapters with the names and shapes, at the client's rank.
        drawn: Seed of the draw; None: nothing is drawn.

    Returns:
        Every A drawn from the seed, and every B zero.
    """
    if drawn is None:
        return {}
    factors = {}
    for name, tensor in start.tensors.items():
        if factor_of(name) == "A":
            factors[name] = fresh_factor(name, tensor.shape, drawn)
        elif factor_of(name) == "B":
            factors[name] = torch.zeros_like(tensor)
    return factors


def is_held(tensor: Tensor, held: Tensor) -> bool:
    """Returns whether a client that holds one tensor need not be sent another: they are equal."""
    return held.shape == tensor.shape and torch.equal(held, tensor)
