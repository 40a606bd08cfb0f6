"""Updates that clients send at the end of a round, the assignments that they begin one with, and their averages.

A strategy needs this module alone: the adapters of `fedsplit.factors` have their names here, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsplit.factors import FACTORS, Adapters, Layer, RefusedUpdate, factor_of, fresh_factor, sure_rank
from fedsplit.lowrank import LowRank, total

__all__ = [
    "FACTORS",
    "Adapters",
    "Assignment",
    "ClientInfo",
    "ClientUpdate",
    "Layer",
    "RefusedUpdate",
    "State",
    "Task",
    "Traits",
    "average",
    "average_adapters",
    "factor_of",
    "fresh_factor",
    "mean_change",
    "mean_changes",
    "sure_rank",
    "weighted",
]

State = Mapping[str, Tensor]
"""A strategy's state: tensors by name. The run saves it after every round."""


@dataclass(frozen=True)
class ClientUpdate:
    """Result of a client's local training in one round.

    Attributes:
        client: Number of the client, from 0.
        adapters: Adapters after training, without the factors that stay at the client.
        examples: Number of training sequences in the round.
        tokens: Number of tokens in these sequences.
        loss: Mean training loss in nats a token. For a mixture of experts it includes the routers' auxiliary loss.
        weight: Weight of the client in an average, by `--weights`; None for `examples`.
        given: Adapters that the client started from; None for the adapters that all clients started from.
        control: Change of the client's control variate by exported name (SCAFFOLD), or the tensors that the strategy's
            gradient stage sends; else empty.
        moments: State of the client's optimiser under `--train.optimizer-state keep`; never leaves the client.
        router_loss: Mean auxiliary loss of the routers, without its coefficient; None without a mixture of experts.
        kept: State of the strategy's gradient stage; never leaves the client.

    Example:
        >>> update = ClientUpdate(client=3, adapters=Adapters({}, {}), examples=40)
        >>> update.client, update.examples
        (3, 40)
    """

    client: int
    adapters: Adapters
    examples: int
    tokens: int = 0
    loss: float = 0.0
    weight: float | None = None
    given: Adapters | None = None
    control: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    router_loss: float | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientInfo:
    """Facts of a client that a strategy may use before the client trains.

    Attributes:
        client: Number of the client, from 0.
        rank: Rank of the client's adapters, by `--lora.rank`.

    Example:
        >>> ClientInfo(client=3, rank=8)
        ClientInfo(client=3, rank=8)
    """

    client: int
    rank: int


@dataclass(frozen=True)
class Task:
    """Terms of local training in a round, beside the settings of the run.

    Attributes:
        trains: Factors that train. A factor that does not train stays as it is, and is not sent back.
        proximal: FedProx's mu: mu / 2 * ||theta - theta_t||^2 is added to the loss (1812.06127).
        control: SCAFFOLD's control variate c of the server, by exported name (1910.06378). The client adds c - c_i to
            its gradients, and returns the change of its c_i. None: no correction.
        tail: HetLoRA's gamma: the share of the rank that `decay` leaves alone.
        decay: HetLoRA's lambda: lambda * ||A_tail|| * ||B_tail|| of every layer is added to the loss.
        settings: Settings of one of Flower's strategies for the mods at the client, such as `clipping_norm`.
    """

    trains: frozenset[str] = FACTORS
    proximal: float = 0.0
    control: Mapping[str, Tensor] | None = None
    tail: float = 1.0
    decay: float = 0.0
    settings: Mapping[str, bool | int | float | str] = field(default_factory=dict)

    def teaches(self, name: str) -> bool:
        """Returns True if the tensor of an exported name trains. Tensors that are no LoRA factors always train.

        Example:
            >>> task = Task(trains=frozenset("B"))
            >>> task.teaches("layer.lora_A.weight"), task.teaches("layer.lora_B.weight"), task.teaches("score.weight")
            (False, True, True)
        """
        factor = factor_of(name)
        return factor is None or factor in self.trains


@dataclass(frozen=True)
class Assignment:
    """Start of a client's round, as the strategy decides it.

    Attributes:
        adapters: Adapters that the client starts from, at the client's rank.
        task: Terms of the training.
        drawn: Seed from which the client draws A (see `fresh_factor`), while B is zero, so that no factor is sent.
            None for factors that are sent.

    Example:
        >>> assignment = Assignment(Adapters({}, {}), Task(proximal=0.1))
        >>> assignment.task.proximal
        0.1
    """

    adapters: Adapters
    task: Task = field(default_factory=Task)
    drawn: int | None = None


@dataclass(frozen=True)
class Traits:
    """Facts of a strategy that a run checks before it starts.

    Attributes:
        factors: True if the strategy needs layers with factors A and B, as LoRA has them.
        restarts: True if every round, the first one included, starts from a drawn A (see `fresh_factor`) and B zero.
        mixed_ranks: True if clients may have different ranks.
        folds: True if the strategy changes base weights.
        personal: Factors that never leave their client.
        linear: True if the strategy needs only weighted sums of the clients' tensors, and could work under secure
            aggregation.
        fewest: Smallest number of clients in a round.
        idles: True if the strategy's clock goes on in rounds in which no client trains, so that it aggregates in every
            round.
        multiplies: True if the strategy computes with the product B @ A, so that a layer must have a single matrix.

    Example:
        >>> Traits(mixed_ranks=True).folds
        False
    """

    factors: bool = False
    restarts: bool = False
    mixed_ranks: bool = False
    folds: bool = False
    personal: frozenset[str] = frozenset()
    linear: bool = False
    fewest: int = 1
    idles: bool = False
    multiplies: bool = False


def weighted(updates: Sequence[ClientUpdate]) -> tuple[list[ClientUpdate], list[float]]:
    """Returns the updates to aggregate, in the order of the clients, and the weight w_i of each.

    The weights sum to 1. Updates of weight zero are left out: the client trained on nothing.

    Raises:
        ValueError: No update has a weight above zero.

    Example:
        >>> adapters = Adapters({}, {})
        >>> updates, weights = weighted([ClientUpdate(1, adapters, examples=3), ClientUpdate(0, adapters, examples=1)])
        >>> [update.client for update in updates], weights
        ([0, 1], [0.25, 0.75])
    """
    # The order of the sum is the order of the clients, not of their arrival: a sum of floats depends on its order.
    trained, weights = [], []
    for update in sorted(updates, key=lambda update: update.client):
        weight = update.examples if update.weight is None else update.weight
        if weight > 0:
            trained.append(update)
            weights.append(weight)
    if not trained:
        raise ValueError("no client trained on any example")

    total_weight = math.fsum(weights)  # exact, so that equal weights give equal shares
    return trained, [weight / total_weight for weight in weights]


def average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Returns the weighted mean of tensors, summed in float64 in the given order and rounded once.

    The mean of a single tensor is that tensor, to the bit.

    Example:
        >>> average([torch.tensor([0.0]), torch.tensor([4.0])], [0.75, 0.25]).tolist()
        [1.0]
    """
    mean = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        mean += tensor.double() * share
    return mean.to(tensors[0].dtype)


def average_adapters(
    adapters: Adapters,
    updates: Sequence[ClientUpdate],
    shares: Sequence[float],
    factors: frozenset[str] = FACTORS,
) -> Adapters:
    """Returns adapters in which the tensors of the updates are replaced by their weighted means.

    Args:
        adapters: Adapters that the clients started from; tensors that no update holds stay, to the bit.
        updates: Updates to average.
        shares: Weights of the updates, which sum to 1.
        factors: LoRA factors to average. Tensors that are no LoRA factors are always averaged.

    Example:
        >>> start = Adapters({"score.weight": torch.zeros(1)}, {})
        >>> ends = [start.with_tensors({"score.weight": torch.tensor([value])}) for value in (1.0, 3.0)]
        >>> updates = [ClientUpdate(client, end, examples=1) for client, end in enumerate(ends)]
        >>> average_adapters(start, updates, [0.5, 0.5]).tensors["score.weight"].item()
        2.0
    """
    tensors = dict(adapters.tensors)
    for name in updates[0].adapters.only(factors).tensors:
        ends = [update.adapters.tensors[name] for update in updates]
        tensors[name] = average(ends, shares)
    return adapters.with_tensors(tensors)


def mean_changes(updates: Sequence[ClientUpdate], shares: Sequence[float], layer: str) -> list[LowRank]:
    """Returns the mean change of each expert of a layer, as `mean_change` does for a layer with one matrix."""
    by_client = [update.adapters.changes(layer) for update in updates]
    means = []
    for changes_of_expert in zip(*by_client, strict=True):
        shared = zip(changes_of_expert, shares, strict=True)
        means.append(total(change.times(share) for change, share in shared))
    return means


def mean_change(updates: Sequence[ClientUpdate], shares: Sequence[float], layer: str) -> LowRank:
    """Returns the exact mean of the clients' changes of a layer, sum_i w_i s_i B_i A_i, as stacked factors.

    Example:
        >>> start = Adapters(
        ...     {"h.lora_A.weight": torch.ones(1, 2), "h.lora_B.weight": torch.ones(1, 1)}, {"h": Layer(1.0, False)}
        ... )
        >>> double = start.with_factors({"h": (torch.full((1, 2), 3.0), torch.ones(1, 1))})
        >>> updates = [ClientUpdate(0, start, examples=1), ClientUpdate(1, double, examples=1)]
        >>> mean = mean_change(updates, [0.5, 0.5], "h")
        >>> (mean.up @ mean.down).tolist()
        [[2.0, 2.0]]
    """
    changes = [update.adapters.change(layer) for update in updates]
    return total(change.times(share) for change, share in zip(changes, shares, strict=True))
