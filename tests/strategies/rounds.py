"""Random clients for any strategy, and what must come out computed the plain way: dense, in float64, by loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsplit.federation.strategy import broadcast, traits_of
from fedsplit.updates import FACTORS, Adapters, ClientInfo, ClientUpdate, Layer, factor_of, fresh_factor

SHAPES = {"linear": (6, 5, False), "conv": (4, 7, True)}
"""Layers as (out, in, transposed)."""


def start(rank: int = 2, alpha: float = 3.0, shapes: Mapping[str, tuple[int, int, bool]] = SHAPES, seed: int = 0):
    """Adapters as a run starts with: A drawn, B zero; alpha is not the rank."""
    tensors: dict[str, Tensor] = {}
    for layer, (out, width, _) in shapes.items():
        name = f"{layer}.lora_A.weight"
        tensors[name] = fresh_factor(name, (rank, width), seed)
        tensors[f"{layer}.lora_B.weight"] = torch.zeros(out, rank)
    return Adapters(tensors, {layer: Layer(alpha, transposed) for layer, (_, _, transposed) in shapes.items()})


@dataclass
class Round:
    """A strategy in the middle of a run."""

    strategy: Any
    state: Mapping[str, Tensor]
    adapters: Adapters
    number: int = 0

    @classmethod
    def begin(cls, strategy: Any, adapters: Adapters) -> Round:
        return cls(strategy, strategy.init(adapters), adapters)

    def train(
        self, ranks: Sequence[int], weights: Sequence[float] | None = None, drift: float = 0.5, seed: int = 0
    ) -> list[ClientUpdate]:
        """What clients of those ranks return: what they were given, with the factors they train moved at random."""
        personal = traits_of(self.strategy).personal
        updates = []
        for client, rank in enumerate(ranks):
            assignment = broadcast(self.strategy, self.state, self.adapters, ClientInfo(client, rank))
            if assignment is None:
                continue
            generator = torch.Generator().manual_seed(10_000 * seed + 100 * self.number + client)
            moved = {
                name: tensor + drift * torch.randn(tensor.shape, generator=generator)
                if factor_of(name) is None or factor_of(name) in assignment.task.trains
                else tensor
                for name, tensor in assignment.adapters.tensors.items()
            }
            control = {}
            if assignment.task.control is not None:
                control = {n: torch.randn(t.shape, generator=generator) for n, t in moved.items()}
            updates.append(
                ClientUpdate(
                    client,
                    assignment.adapters.with_tensors(moved).only(FACTORS - personal),
                    examples=client + 1,
                    weight=None if weights is None else weights[client],
                    given=assignment.adapters,
                    control=control,
                )
            )
        return updates

    def aggregate(self, updates: Sequence[ClientUpdate]) -> Adapters:
        """One round's aggregation; what it returns has what is to be folded, what is kept has not."""
        self.state, result = self.strategy.aggregate(self.state, self.adapters, updates)
        self.adapters = result.with_tensors(result.tensors)
        self.number += 1
        return result


def ideal(updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """Delta W* = sum_i w_i s_i B_i A_i of every layer, dense (out, in), weighted by examples or by the given weight."""
    weights = [float(u.examples if u.weight is None else u.weight) for u in updates]
    whole: dict[str, Tensor] = {}
    for update, weight in zip(updates, weights, strict=True):
        for layer, facts in update.adapters.layers.items():
            a = update.adapters.tensors[f"{layer}.lora_A.weight"].double()
            b = update.adapters.tensors[f"{layer}.lora_B.weight"].double()
            s = facts.alpha / (a.shape[0] ** 0.5 if facts.rslora else a.shape[0])
            whole[layer] = whole.get(layer, 0.0) + weight / sum(weights) * s * (b @ a)
    return whole


def applied(adapters: Adapters) -> dict[str, Tensor]:
    """What adapters add to the weights, dense (out, in): s B A, and what is to be folded."""
    whole = {}
    for layer, facts in adapters.layers.items():
        a = adapters.tensors[f"{layer}.lora_A.weight"].double()
        b = adapters.tensors[f"{layer}.lora_B.weight"].double()
        s = facts.alpha / (a.shape[0] ** 0.5 if facts.rslora else a.shape[0])
        whole[layer] = s * (b @ a)
        if layer in adapters.folded:
            change = adapters.folded[layer]
            whole[layer] = whole[layer] + change.up.double() @ change.down.double()
    return whole


def error(adapters: Adapters, updates: Sequence[ClientUpdate]) -> float:
    """||applied - Delta W*|| / ||Delta W*|| over all layers."""
    got, wanted = applied(adapters), ideal(updates)
    missed = sum(float(((got[layer] - wanted[layer]) ** 2).sum()) for layer in wanted)
    return (missed / sum(float((tensor**2).sum()) for tensor in wanted.values())) ** 0.5


def by_hand(
    strategy: Any,
    pairs: Sequence[tuple[list[list[float]], list[list[float]]]],
    examples: Sequence[int],
    alpha: float,
    before: tuple[list[list[float]], list[list[float]]] | None = None,
    transposed: bool = False,
    change: Callable[[ClientUpdate], ClientUpdate] = lambda update: update,
) -> Adapters:
    """One round of a single layer "l" whose factors (A, B) of every client are written out.

    Args:
        strategy: Whose rule.
        pairs: A and B of each client.
        examples: Of each.
        alpha: LoRA's.
        before: A and B that they started from; zeros of the first client's shapes where not given.
        transposed: As Conv1D.
        change: Applied to each update.
    """

    def adapters(pair: tuple[list[list[float]], list[list[float]]]) -> Adapters:
        named = {f"l.lora_{factor}.weight": torch.tensor(value) for factor, value in zip("AB", pair, strict=True)}
        return Adapters(named, {"l": Layer(alpha, transposed)})

    first = adapters(pairs[0])
    given = adapters(before) if before else replace(first, tensors={n: t * 0 for n, t in first.tensors.items()})
    updates = [
        change(ClientUpdate(client, adapters(pair), count, given=given))
        for client, (pair, count) in enumerate(zip(pairs, examples, strict=True))
    ]
    return strategy.aggregate(strategy.init(given), given, updates)[1]
