"""Adapters, the updates that clients send at the end of a round, and the assignments that they begin one with."""

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
    """An update that must not be aggregated. The message names the client and the fault."""


FACTORS = frozenset("AB")
"""Names of the two factors of a LoRA layer."""


def factor_of(name: str) -> str | None:
    """Returns the factor of a LoRA layer that an exported name stands for: "A", "B", or None for any other tensor.

    Example:
        >>> factor_of("h.0.attn.c_attn.lora_A.weight"), factor_of("score.weight")
        ('A', None)
    """
    for factor in "AB":
        if name.endswith(f".lora_{factor}.weight"):
            return factor
    return None


@dataclass(frozen=True)
class Layer:
    """Facts of an adapted layer beside its factors.

    Attributes:
        alpha: LoRA's alpha. With the rank r it gives the scaling s of the layer's change s * B @ A.
        transposed: True if the base stores the weight as (in, out), as GPT-2's Conv1D does. The change to add is then
            the transpose of s * B @ A.
        rslora: True if s is alpha / sqrt(r) (2312.03732); False if it is alpha / r.
        experts: Number E of matrices that are stacked in the weight (E, out, in). PEFT keeps the factors of all experts
            in one tensor each: A (E * r, in) expert by expert, B (out, r * E) rank by rank. Their product B @ A has no
            meaning. The change of expert e is s times the product of the expert's own factors.
        parameter: Name of the weight within its module.

    Example:
        >>> Layer(alpha=16.0, transposed=False).scaling(rank=8)
        2.0
    """

    alpha: float
    transposed: bool
    rslora: bool = False
    experts: int = 1
    parameter: str = "weight"

    def scaling(self, rank: int) -> float:
        """Returns the scaling s for a rank."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Adapters:
    """Adapters of one or more parts.

    Attributes:
        tensors: Factors by exported name: the name that PEFT writes to a file, with the layer numbers of the unsplit
            model. Examples are `transformer.h.0.attn.c_attn.lora_A.weight` (r, in) and `….lora_B.weight` (out, r).
            Clients may differ in r.
        layers: Adapted layers by module name, such as `transformer.h.0.attn.c_attn`.
        folded: Matrices (out, in) by layer, in the result of a strategy alone. Every party adds them to its base
            weights before the next round.

    Example:
        >>> a, b = torch.ones(1, 3), torch.ones(2, 1)
        >>> adapters = Adapters({"h.lora_A.weight": a, "h.lora_B.weight": b}, {"h": Layer(2.0, transposed=False)})
        >>> change = adapters.change("h")  # s * B @ A, as its factors
        >>> (change.up @ change.down).tolist()
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """

    tensors: Mapping[str, Tensor]
    layers: Mapping[str, Layer]
    folded: Mapping[str, LowRank] = field(default_factory=dict)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Returns the factors A (r, in) and B (out, r) of a layer."""
        return self.tensors[f"{layer}.lora_A.weight"], self.tensors[f"{layer}.lora_B.weight"]

    def rank(self, layer: str) -> int:
        """Returns the rank r of a layer, from whichever of its factors is present."""
        if (a := self.tensors.get(f"{layer}.lora_A.weight")) is not None:
            return a.shape[0] // self.layers[layer].experts
        return self.tensors[f"{layer}.lora_B.weight"].shape[1] // self.layers[layer].experts

    @property
    def largest_rank(self) -> int:
        """Largest rank of the complete layers; 0 without any."""
        return max((self.rank(layer) for layer in self.complete), default=0)

    def scaling(self, layer: str) -> float:
        """Returns the scaling s of a layer."""
        return self.layers[layer].scaling(self.rank(layer))

    def change(self, layer: str) -> LowRank:
        """Returns the change of a layer's weight, s * B @ A (out, in), in float64; not yet transposed for Conv1D.

        Raises:
            ValueError: Several experts' weights are stacked in the layer.
        """
        if self.layers[layer].experts > 1:
            raise ValueError(f"{layer} stacks the weights of experts: each has a change of its own (see changes)")
        a, b = self.factors(layer)
        return LowRank(b.double() * self.scaling(layer), a.double())

    def changes(self, layer: str) -> list[LowRank]:
        """Returns the change of each expert's weight, as `change` does; one change for a layer without experts."""
        experts, (a, b) = self.layers[layer].experts, self.factors(layer)
        downs = a.double().unflatten(0, (experts, -1))
        ups = (b.double() * self.scaling(layer)).unflatten(1, (-1, experts))
        return [LowRank(ups[:, :, expert], downs[expert]) for expert in range(experts)]

    def weight_name(self, layer: str) -> str:
        """Returns the name, in the unsplit model, of the weight that a layer's adapter changes."""
        module = layer
        while self.layers[layer].parameter != "weight" and module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")  # PEFT wraps a module once for each of its parameters
        return f"{module}.{self.layers[layer].parameter}"

    def _both(self) -> list[str]:
        return [layer for layer in sorted(self.layers) if all(f"{layer}.lora_{f}.weight" in self.tensors for f in "AB")]

    @property
    def complete(self) -> list[str]:
        """Layers with both factors and a single matrix, ordered by name."""
        return [layer for layer in self._both() if self.layers[layer].experts == 1]

    @property
    def stacked(self) -> list[str]:
        """Layers with both factors and several experts, ordered by name."""
        return [layer for layer in self._both() if self.layers[layer].experts > 1]

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Adapters:
        """Returns the same layers with other tensors, and nothing to fold."""
        return Adapters(tensors, self.layers)

    def with_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Adapters:
        """Returns a copy in which the factors (A, B) of some layers are replaced; the types of the tensors stay."""
        tensors = dict(self.tensors)
        for layer, pair in factors.items():
            for factor, tensor in zip("AB", pair, strict=True):
                name = f"{layer}.lora_{factor}.weight"
                tensors[name] = tensor.to(tensors[name].dtype).contiguous()
        return replace(self, tensors=tensors)

    def only(self, factors: frozenset[str]) -> Adapters:
        """Returns a copy without the LoRA factors that are not named; all other tensors stay."""
        return self.with_tensors({n: t for n, t in self.tensors.items() if factor_of(n) in (None, *factors)})

    def with_rank(self, rank: int) -> Adapters:
        """Returns a copy at another rank: factors are truncated, or padded with zeros.

        Every rank-one term that remains adds the same to the weights as before. B is multiplied by the ratio of the
        scalings: with alpha / r, a layer of half the rank has twice the scaling.
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
        """Returns the adapters of both operands; the right one wins where a name is in both."""
        return Adapters(
            {**self.tensors, **other.tensors}, {**self.layers, **other.layers}, {**self.folded, **other.folded}
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check_fits(self, tensors: Mapping[str, Tensor], sender: str) -> None:
        """Makes sure that tensors of a client or a strategy can replace these.

        Args:
            tensors: The tensors by exported name.
            sender: Name of the client or strategy, for the message.

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
        """Makes sure that the matrices to fold belong to adapted layers, have their shapes and are finite.

        Raises:
            RefusedUpdate: One of them does not.
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
    """Result of a client's local training in one round.

    Attributes:
        client: Number of the client, from 0.
        adapters: Adapters after training, without the factors that stay at the client.
        examples: Number of training sequences in the round.
        tokens: Number of tokens in these sequences.
        loss: Mean training loss in nats a token, with the routers' auxiliary loss where there is one.
        weight: Weight of the client in an average, by `--weights`; None for `examples`.
        given: Adapters that the client started from; None for the adapters that all clients started from.
        control: Change of the client's control variate by exported name (SCAFFOLD), or the tensors that the strategy's
            own gradient stage sends; empty otherwise.
        moments: State of the client's optimiser, where it is kept. It never leaves the client.
        router_loss: Mean auxiliary loss of the routers, without its coefficient; None without a mixture of experts.
        kept: State of the strategy's own gradient stage. It never leaves the client.
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
    """

    client: int
    rank: int


@dataclass(frozen=True)
class Task:
    """Terms of local training in a round, beside the settings of the run.

    Attributes:
        trains: Factors that train. The others stay as they are, and are not sent back.
        proximal: FedProx's mu: mu / 2 * ||theta - theta_t||^2 is added to the loss (1812.06127).
        control: SCAFFOLD's control variate c of the server, by exported name (1910.06378). The client adds c - c_i to
            its gradients, and returns the change of its own c_i. None: no correction.
        tail: HetLoRA's gamma: the share of the rank that `decay` leaves alone.
        decay: HetLoRA's lambda: lambda * ||A_tail|| * ||B_tail|| of every layer is added to the loss.
    """

    trains: frozenset[str] = FACTORS
    proximal: float = 0.0
    control: Mapping[str, Tensor] | None = None
    tail: float = 1.0
    decay: float = 0.0

    def teaches(self, name: str) -> bool:
        """Returns True if the tensor of an exported name trains. A tensor that is no LoRA factor always does.

        Example:
            >>> task = Task(trains=frozenset("B"))
            >>> task.teaches("layer.lora_A.weight"), task.teaches("layer.lora_B.weight"), task.teaches("score.weight")
            (False, True, True)
        """
        return factor_of(name) is None or factor_of(name) in self.trains


@dataclass(frozen=True)
class Assignment:
    """Start of a client's round, as the strategy decides it.

    Attributes:
        adapters: Adapters that the client starts from, at the client's rank.
        task: Terms of the training.
        drawn: Seed from which the client draws A (see `fresh_factor`), with B zero, so that neither is sent; None for
            factors that are sent.
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
        linear: True if the strategy needs weighted sums of the clients' tensors only, and no single client's. Such a
            strategy can work under secure aggregation.
        fewest: Smallest number of clients in a round.
        idles: True if the strategy aggregates in rounds in which no client trained, too, since its clock goes on.
        multiplies: True if the strategy computes with the product B @ A, so that a layer must have a single matrix.
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
    """Returns the rank without its tail (see `Task`): floor(tail * rank), at least 1.

    Example:
        >>> sure_rank(8, 0.5)
        4
    """
    return max(1, math.floor(tail * rank + 1e-9))  # 0.29 * 100 is 28.999999999999996


def fresh_factor(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Draws a new factor A (r, in) with PEFT's distribution, from a seed and the layer's name alone.

    Args:
        name: Exported name of the factor.
        shape: Shape (r, in).
        seed: Seed of the draw.

    Example:
        >>> one, again = (fresh_factor("h.lora_A.weight", (2, 3), seed=5) for _ in range(2))
        >>> torch.equal(one, again)
        True
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
    adapters: Adapters, updates: Sequence[ClientUpdate], shares: Sequence[float], factors: frozenset[str] = FACTORS
) -> Adapters:
    """Returns adapters in which the tensors of the updates are replaced by their weighted means.

    Args:
        adapters: Adapters that the clients started from; tensors that no update holds stay, to the bit.
        updates: Updates to average.
        shares: Weights of the updates, which sum to 1.
        factors: LoRA factors that are averaged. Tensors that are no LoRA factor always are.

    Example:
        >>> start = Adapters({"score.weight": torch.zeros(1)}, {})
        >>> ends = [start.with_tensors({"score.weight": torch.tensor([value])}) for value in (1.0, 3.0)]
        >>> updates = [ClientUpdate(client, end, examples=1) for client, end in enumerate(ends)]
        >>> average_adapters(start, updates, [0.5, 0.5]).tensors["score.weight"].item()
        2.0
    """
    held = updates[0].adapters.only(factors).tensors
    means = {name: average([update.adapters.tensors[name] for update in updates], shares) for name in held}
    return adapters.with_tensors({**adapters.tensors, **means})


def mean_changes(updates: Sequence[ClientUpdate], shares: Sequence[float], layer: str) -> list[LowRank]:
    """Returns the mean change of each expert of a layer, as `mean_change` does for a layer with one matrix."""
    by_client = [update.adapters.changes(layer) for update in updates]
    return [
        total(change.times(share) for change, share in zip(own, shares, strict=True))
        for own in zip(*by_client, strict=True)
    ]


def mean_change(updates: Sequence[ClientUpdate], shares: Sequence[float], layer: str) -> LowRank:
    """Returns the exact mean of the clients' changes of a layer, sum_i w_i s_i B_i A_i, as stacked factors."""
    return total(update.adapters.change(layer).times(share) for update, share in zip(updates, shares, strict=True))
