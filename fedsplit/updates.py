"""What crosses once a round: adapters down to the clients, and what they made of them up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsplit.lowrank import LowRank, total
from fedsplit.seeds import derive_seed

State = Mapping[str, Tensor]
"""A strategy's state: tensors by name. The run saves it after every round."""


class RefusedUpdate(Exception):
    """A client's answer that must not be aggregated; says whose it is and what is wrong with it."""


FACTORS = frozenset("AB")
"""The names of both factors of a LoRA layer."""


def factor_of(name: str) -> str | None:
    """Which factor of a LoRA layer an exported name stands for: "A", "B", or None if it is something else."""
    for factor in "AB":
        if name.endswith(f".lora_{factor}.weight"):
            return factor
    return None


@dataclass(frozen=True)
class Layer:
    """What a strategy must know of an adapted layer beside its factors.

    Attributes:
        alpha: LoRA's alpha, which with the rank r decides the scaling s in the layer's change s * B @ A.
        transposed: Whether the base stores its weight as (in, out), as GPT-2's Conv1D does; the change
            to add is then the transpose of s * B @ A.
        rslora: Whether s is alpha / sqrt(r) (2312.03732), and not alpha / r.
        experts: How many matrices are stacked in the weight, (E, out, in). The factors are then all experts' in one
            tensor each, as PEFT has them: A (E * r, in) expert by expert, B (out, r * E) rank by rank. B @ A means
            nothing; expert e's change is s times the product of its own factors.
        parameter: The name of the weight within its module, where it is not "weight".
    """

    alpha: float
    transposed: bool
    rslora: bool = False
    experts: int = 1
    parameter: str = "weight"

    def scaling(self, rank: int) -> float:
        """The factor s at that rank."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Adapters:
    """The adapters of one or more parts.

    Attributes:
        tensors: The factors by the names PEFT writes to a file, in the numbering of the unsplit model, e.g.
            `transformer.h.0.attn.c_attn.lora_A.weight` (r, in) and `….lora_B.weight` (out, r). Clients may differ
            in r.
        layers: The adapted layers by module name, e.g. `transformer.h.0.attn.c_attn`.
        folded: Only of what a strategy returns: matrices (out, in) by layer that are to be added to the base
            weights for good, at every party, before the next round.
    """

    tensors: Mapping[str, Tensor]
    layers: Mapping[str, Layer]
    folded: Mapping[str, LowRank] = field(default_factory=dict)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """The pair A (r, in), B (out, r) of a layer."""
        return self.tensors[f"{layer}.lora_A.weight"], self.tensors[f"{layer}.lora_B.weight"]

    def rank(self, layer: str) -> int:
        """The rank r of a layer, of which one factor at least must be here."""
        if (a := self.tensors.get(f"{layer}.lora_A.weight")) is not None:
            return a.shape[0] // self.layers[layer].experts
        return self.tensors[f"{layer}.lora_B.weight"].shape[1] // self.layers[layer].experts

    @property
    def largest_rank(self) -> int:
        """The largest rank of the layers of which both factors are here; 0 where there is none."""
        return max((self.rank(layer) for layer in self.complete), default=0)

    def scaling(self, layer: str) -> float:
        """The factor s of a layer."""
        return self.layers[layer].scaling(self.rank(layer))

    def change(self, layer: str) -> LowRank:
        """What a layer's adapter adds to its weight, s * B @ A (out, in), in float64; not yet transposed for Conv1D.

        Raises:
            ValueError: Several experts' weights are stacked in the layer.
        """
        if self.layers[layer].experts > 1:
            raise ValueError(f"{layer} stacks the weights of experts: each has a change of its own (see changes)")
        a, b = self.factors(layer)
        return LowRank(b.double() * self.scaling(layer), a.double())

    def changes(self, layer: str) -> list[LowRank]:
        """What a layer's adapter adds to its weights, as `change`: of each expert where they are stacked, else one."""
        experts, (a, b) = self.layers[layer].experts, self.factors(layer)
        downs = a.double().unflatten(0, (experts, -1))
        ups = (b.double() * self.scaling(layer)).unflatten(1, (-1, experts))
        return [LowRank(ups[:, :, expert], downs[expert]) for expert in range(experts)]

    def weight_name(self, layer: str) -> str:
        """The name in the unsplit model of the weight that a layer's adapter changes."""
        module = layer
        while self.layers[layer].parameter != "weight" and module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")  # PEFT wraps a module once for each of its parameters
        return f"{module}.{self.layers[layer].parameter}"

    def _both(self) -> list[str]:
        return [layer for layer in sorted(self.layers) if all(f"{layer}.lora_{f}.weight" in self.tensors for f in "AB")]

    @property
    def complete(self) -> list[str]:
        """The layers of which both factors are here and are those of one matrix, in order of their names."""
        return [layer for layer in self._both() if self.layers[layer].experts == 1]

    @property
    def stacked(self) -> list[str]:
        """The layers of which both factors are here and are those of several experts, in order of their names."""
        return [layer for layer in self._both() if self.layers[layer].experts > 1]

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Adapters:
        """The same layers with other factors, and nothing to fold."""
        return Adapters(tensors, self.layers)

    def with_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Adapters:
        """The same with the factors (A, B) of some layers replaced; their types stay."""
        tensors = dict(self.tensors)
        for layer, pair in factors.items():
            for factor, tensor in zip("AB", pair, strict=True):
                name = f"{layer}.lora_{factor}.weight"
                tensors[name] = tensor.to(tensors[name].dtype).contiguous()
        return replace(self, tensors=tensors)

    def only(self, factors: frozenset[str]) -> Adapters:
        """Without those factors of LoRA layers that are not named; what is no such factor stays."""
        return self.with_tensors({n: t for n, t in self.tensors.items() if factor_of(n) in (None, *factors)})

    def with_rank(self, rank: int) -> Adapters:
        """Cut or filled with zeros to another rank, so that what is kept adds the same to the weights as before.

        B takes up the ratio of the scalings: with alpha / r, a layer of half the rank has twice the scaling.
        """
        factors = {}
        for layer in self.complete:
            (a, b), old = self.factors(layer), self.rank(layer)
            ratio = self.layers[layer].scaling(old) / self.layers[layer].scaling(rank)
            grown = max(0, rank - old)
            down = torch.cat([a[:rank], a.new_zeros(grown, a.shape[1])])
            up = torch.cat([b[:, :rank] * ratio, b.new_zeros(b.shape[0], grown)], dim=1)
            factors[layer] = down, up
        return self.with_factors(factors)

    def __or__(self, other: Adapters) -> Adapters:
        """The adapters of the parts of both."""
        return Adapters(
            {**self.tensors, **other.tensors}, {**self.layers, **other.layers}, {**self.folded, **other.folded}
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check_fits(self, tensors: Mapping[str, Tensor], sender: str) -> None:
        """Makes sure that factors sent by somebody can take the place of these.

        Args:
            tensors: The factors that were sent.
            sender: Who sent them, for the message.

        Raises:
            RefusedUpdate: A name is missing or unknown, a shape differs, or a value is NaN or infinite.
        """
        if strange := sorted(tensors.keys() ^ self.tensors.keys()):
            raise RefusedUpdate(
                f"{sender} sent other layers than it was given: {strange[0]} and {len(strange) - 1} more"
            )
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise RefusedUpdate(f"{sender} sent {name} as {type(tensor).__name__}, not as a tensor")
            if tensor.shape != self.tensors[name].shape:
                expected, got = tuple(self.tensors[name].shape), tuple(tensor.shape)
                raise RefusedUpdate(f"{sender} sent {name} with shape {got} in place of {expected}")
            if not tensor.is_floating_point():
                raise RefusedUpdate(f"{sender} sent {name} as {tensor.dtype}, not as numbers with a fraction")
            if not torch.isfinite(tensor).all():
                raise RefusedUpdate(f"{sender} sent NaN or infinite values in {name}")

    def check_folded(self, sender: str) -> None:
        """Makes sure that what is to be folded belongs to layers of these adapters, fits them and is finite.

        Raises:
            RefusedUpdate: It does not.
        """
        for layer, change in self.folded.items():
            if layer not in self.layers:
                raise RefusedUpdate(f"{sender} wants to fold something into {layer}, which is no adapted layer")
            a, b = self.factors(layer)
            if change.shape != (b.shape[0], a.shape[1]) or change.up.shape[1] != change.down.shape[0]:
                raise RefusedUpdate(f"{sender} wants to fold a matrix of shape {change.shape} into {layer}")
            if not (torch.isfinite(change.up).all() and torch.isfinite(change.down).all()):
                raise RefusedUpdate(f"{sender} wants to fold NaN or infinite values into {layer}")


@dataclass(frozen=True)
class ClientUpdate:
    """What a client returns at the end of its local training.

    Attributes:
        client: The client's partition, from 0.
        adapters: Its adapters after training; without the factors that stay with it.
        examples: Training sequences it went through this round.
        tokens: Tokens among them.
        loss: Mean training loss, nats a token; what is minimised, so with the routers' where there is one.
        weight: What it counts beside others, by the run's `--weights`; its examples where not given.
        given: What it started from; what the strategy gave to all where not given.
        control: Change of its control variate, by exported name (SCAFFOLD), or the tensors that the strategy's own
            gradient stage sends; empty otherwise.
        moments: What its optimiser remembers, where that is kept; it never leaves the client.
        router_loss: Its routers' mean auxiliary loss, without the coefficient; None where there is none.
        kept: State of the strategy's own gradient stage; it never leaves the client.
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
    """What a strategy knows of a client before it trains.

    Attributes:
        client: Its partition, from 0.
        rank: The rank that it was assigned by `--lora.rank`.
    """

    client: int
    rank: int


@dataclass(frozen=True)
class Task:
    """How a client trains in a round, beside its settings.

    Attributes:
        trains: The factors that train; the others stay as they are, and are not sent back.
        proximal: FedProx's mu: mu / 2 * ||theta - theta_t||^2 is added to the loss.
        control: SCAFFOLD's control variate c of the server, by exported name; the client corrects its gradients by
            its own and this, and returns what its own has changed by. None: no such correction.
        tail: HetLoRA's gamma: the share of the rank that is sure to stay; the rest is what `decay` acts on.
        decay: HetLoRA's lambda: lambda * ||A_tail|| * ||B_tail|| of every layer is added to the loss.
    """

    trains: frozenset[str] = FACTORS
    proximal: float = 0.0
    control: Mapping[str, Tensor] | None = None
    tail: float = 1.0
    decay: float = 0.0

    def teaches(self, name: str) -> bool:
        """Returns whether a tensor trains, by its exported name. A tensor that is no factor of LoRA always does.

        Example:
            >>> task = Task(trains=frozenset("B"))
            >>> task.teaches("layer.lora_A.weight"), task.teaches("layer.lora_B.weight"), task.teaches("score.weight")
            (False, True, True)
        """
        return factor_of(name) is None or factor_of(name) in self.trains


@dataclass(frozen=True)
class Assignment:
    """What a strategy gives a client at the beginning of a round.

    Attributes:
        adapters: What it starts from, at the client's rank.
        task: How it trains.
        drawn: Where given, A is what `fresh_factor` draws from this seed and B is zero, so that neither needs to
            be sent.
    """

    adapters: Adapters
    task: Task = field(default_factory=Task)
    drawn: int | None = None


@dataclass(frozen=True)
class Traits:
    """What must be known of a strategy before a run.

    Attributes:
        factors: It needs layers with a pair of factors A and B, as LoRA has them.
        restarts: Every round starts from A as `fresh_factor` draws it and B zero, the first one, too.
        mixed_ranks: Clients may have different ranks.
        folds: It changes base weights.
        personal: The factors that never leave their client.
        linear: It needs weighted sums of what clients send, and nothing of a single one; only such a strategy can
            work under secure aggregation.
        fewest: The clients that must answer in a round at least.
        idles: It is asked to aggregate in rounds, too, in which nobody trained, since its clock goes on then.
        multiplies: It computes with B @ A, or with factors as halves of it, so that it needs layers of one matrix.
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


def sure_rank(rank: int, tail: float) -> int:
    """The rank without its tail (see `Task`): floor(tail * rank), and 1 at least."""
    return max(1, math.floor(tail * rank + 1e-9))  # 0.29 * 100 is 28.999999999999996


def fresh_factor(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """A new factor A (r, in) as PEFT draws it, from a seed and the layer's name alone; B begins at zero.

    Args:
        name: Its exported name.
        shape: (r, in).
        seed: The draw.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", name))
    tensor = torch.empty(*shape)
    torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    return tensor


def weighted(updates: Sequence[ClientUpdate]) -> tuple[list[ClientUpdate], list[float]]:
    """Returns the updates to aggregate, in the order of the clients, and the weight w_i of each.

    The weights sum to 1. Updates of weight zero are left out: their clients trained on nothing.

    Raises:
        ValueError: No update has a weight above zero.

    Example:
        >>> adapters = Adapters({}, {})
        >>> updates, weights = weighted([ClientUpdate(1, adapters, examples=3), ClientUpdate(0, adapters, examples=1)])
        >>> [update.client for update in updates], weights
        ([0, 1], [0.25, 0.75])
    """
    absolute = {update.client: update.examples if update.weight is None else update.weight for update in updates}
    trained = [update for update in updates if absolute[update.client] > 0]
    if not trained:
        raise ValueError("no client trained on any example")

    ordered = sorted(trained, key=lambda update: update.client)
    total_weight = math.fsum(absolute[update.client] for update in ordered)
    return ordered, [absolute[update.client] / total_weight for update in ordered]


def average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean, summed in float64 in the given order and rounded once.

    A single one is returned to the bit.
    """
    mean = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        mean += tensor.double() * share
    return mean.to(tensors[0].dtype)


def average_adapters(
    adapters: Adapters, updates: Sequence[ClientUpdate], shares: Sequence[float], factors: frozenset[str] = FACTORS
) -> Adapters:
    """The adapters with what the updates hold replaced by its weighted mean.

    Args:
        adapters: What stays where there is no mean, to the bit.
        updates: What is averaged.
        shares: The weights, which sum to 1.
        factors: The factors of LoRA layers that are averaged; what is no such factor always is.
    """
    held = updates[0].adapters.only(factors).tensors
    means = {name: average([update.adapters.tensors[name] for update in updates], shares) for name in held}
    return adapters.with_tensors({**adapters.tensors, **means})


def mean_changes(updates: Sequence[ClientUpdate], shares: Sequence[float], layer: str) -> list[LowRank]:
    """As `mean_change`, of each expert of a layer that stacks them."""
    by_client = [update.adapters.changes(layer) for update in updates]
    return [
        total(change.times(share) for change, share in zip(own, shares, strict=True))
        for own in zip(*by_client, strict=True)
    ]


def mean_change(updates: Sequence[ClientUpdate], shares: Sequence[float], layer: str) -> LowRank:
    """What the mean client adds to a layer's weight, sum_i w_i s_i B_i A_i, exactly, as stacked factors."""
    return total(update.adapters.change(layer).times(share) for update, share in zip(updates, shares, strict=True))
