"""Adapters: the factors of LoRA layers, the changes that they make, and the checks of tensors that replace them."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsplit.lowrank import LowRank
from fedsplit.seeds import derive_seed


class RefusedUpdate(Exception):
    """An update that must not be aggregated. The message names the client and the fault."""


FACTORS = frozenset("AB")
"""Names of the two factors of a LoRA layer."""


def factor_name(layer: str, factor: str) -> str:
    """Returns the exported name of a factor.

    Example:
        >>> factor_name("h.0.attn.c_attn", "A")
        'h.0.attn.c_attn.lora_A.weight'
    """
    return f"{layer}.lora_{factor}.weight"


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
    """Constants of an adapted layer: everything that its change depends on beside the factors.

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
        divisor = math.sqrt(rank) if self.rslora else rank
        return self.alpha / divisor


def select(tensors: Mapping[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
    """Returns the tensors that have one of some names.

    Example:
        >>> list(select({"a": torch.ones(1), "b": torch.ones(1)}, {"b", "c"}))
        ['b']
    """
    return {name: tensor for name, tensor in tensors.items() if name in names}


@dataclass(frozen=True)
class Adapters:
    """Adapters of one or more parts.

    Attributes:
        tensors: Factors by exported name: the name that PEFT writes to a file, with the layer numbers of the unsplit
            model. Examples are `transformer.h.0.attn.c_attn.lora_A.weight` (r, in) and `….lora_B.weight` (out, r).
            Clients may differ in r.
        layers: Adapted layers by module name, such as `transformer.h.0.attn.c_attn`.
        folded: Matrices (out, in) by layer, in the result of a strategy alone. Before the next round every party adds
            the matrices to its base weights.

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
        return self.tensors[factor_name(layer, "A")], self.tensors[factor_name(layer, "B")]

    def rank(self, layer: str) -> int:
        """Returns the rank r of a layer, from whichever of its factors is present."""
        experts = self.layers[layer].experts
        a = self.tensors.get(factor_name(layer, "A"))
        if a is not None:
            return a.shape[0] // experts
        b = self.tensors[factor_name(layer, "B")]
        return b.shape[1] // experts

    @property
    def largest_rank(self) -> int:
        """Largest rank of the complete layers; 0 without any."""
        return max((self.rank(layer) for layer in self.complete), default=0)

    def scaling(self, layer: str) -> float:
        """Returns the scaling s of a layer."""
        return self.layers[layer].scaling(self.rank(layer))

    def change(self, layer: str) -> LowRank:
        """Returns the change of a layer's weight, s * B @ A (out, in), in float64. Conv1D needs its transpose.

        Raises:
            ValueError: Several experts' weights are stacked in the layer.
        """
        if self.layers[layer].experts > 1:
            raise ValueError(f"{layer} stacks the weights of several experts, so that it has several changes")
        a, b = self.factors(layer)
        return LowRank(b.double() * self.scaling(layer), a.double())

    def changes(self, layer: str) -> list[LowRank]:
        """Returns the change of each expert's weight, as `change` does; one change for a layer without experts."""
        experts = self.layers[layer].experts
        a, b = self.factors(layer)
        # PEFT's layout: the rows of A go expert by expert, and the columns of B rank by rank.
        downs = a.double().unflatten(0, (experts, -1))
        scaled = b.double() * self.scaling(layer)
        ups = scaled.unflatten(1, (-1, experts))
        return [LowRank(ups[:, :, expert], downs[expert]) for expert in range(experts)]

    def weight_name(self, layer: str) -> str:
        """Returns the name, in the unsplit model, of the weight that a layer's adapter changes."""
        parameter = self.layers[layer].parameter
        module = layer
        if parameter != "weight":
            # PEFT wraps a module once for each of its parameters, and every wrapper adds a level to the name.
            while module.endswith(".base_layer"):
                module = module.removesuffix(".base_layer")
        return f"{module}.{parameter}"

    def _with_both_factors(self) -> list[str]:
        layers = []
        for layer in sorted(self.layers):
            has_a = factor_name(layer, "A") in self.tensors
            has_b = factor_name(layer, "B") in self.tensors
            if has_a and has_b:
                layers.append(layer)
        return layers

    @property
    def complete(self) -> list[str]:
        """Layers with both factors and a single matrix, ordered by name."""
        return [layer for layer in self._with_both_factors() if self.layers[layer].experts == 1]

    @property
    def stacked(self) -> list[str]:
        """Layers with both factors and several experts, ordered by name."""
        return [layer for layer in self._with_both_factors() if self.layers[layer].experts > 1]

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Adapters:
        """Returns the same layers with new tensors, and nothing to fold."""
        return Adapters(tensors, self.layers)

    def updated(self, tensors: Mapping[str, Tensor]) -> Adapters:
        """Returns a copy with some tensors replaced, and nothing to fold.

        Example:
            >>> adapters = Adapters({"head": torch.zeros(1), "norm": torch.zeros(1)}, {})
            >>> adapters.updated({"head": torch.ones(1)}).tensors
            {'head': tensor([1.]), 'norm': tensor([0.])}
        """
        return self.with_tensors({**self.tensors, **tensors})

    def in_float64(self) -> Adapters:
        """Returns a copy in float64, for sums that are rounded once at the end. Nothing is to fold."""
        exact = {name: tensor.double() for name, tensor in self.tensors.items()}
        return self.with_tensors(exact)

    def with_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Adapters:
        """Returns a copy in which the factors (A, B) of some layers are replaced; the types of the tensors stay."""
        tensors = dict(self.tensors)
        for layer, pair in factors.items():
            for factor, tensor in zip("AB", pair, strict=True):
                name = factor_name(layer, factor)
                # Contiguous, since a factor may be a slice of a larger matrix, and files and messages need whole ones.
                tensors[name] = tensor.to(tensors[name].dtype).contiguous()
        return replace(self, tensors=tensors)

    def only(self, factors: frozenset[str]) -> Adapters:
        """Returns a copy without the LoRA factors that `factors` does not name. Other tensors stay."""
        remaining = {}
        for name, tensor in self.tensors.items():
            factor = factor_of(name)
            if factor is None or factor in factors:
                remaining[name] = tensor
        return self.with_tensors(remaining)

    def with_rank(self, rank: int) -> Adapters:
        """Returns a copy at another rank: factors are truncated, or padded with zeros.

        Every rank-one term that remains adds the same to the weights as before.
        """
        factors = {}
        for layer in self.complete:
            a, b = self.factors(layer)
            old_rank = self.rank(layer)
            added_rank = max(0, rank - old_rank)
            # The scaling depends on the rank: with alpha / r, half the rank has twice the scaling. B makes up for it.
            ratio = self.layers[layer].scaling(old_rank) / self.layers[layer].scaling(rank)
            outputs = b.shape[0]
            inputs = a.shape[1]
            down = torch.cat([a[:rank], a.new_zeros(added_rank, inputs)])
            remaining_columns = b[:, :rank] * ratio
            added_columns = b.new_zeros(outputs, added_rank)
            up = torch.cat([remaining_columns, added_columns], dim=1)
            factors[layer] = down, up
        return self.with_factors(factors)

    def __or__(self, other: Adapters) -> Adapters:
        """Returns the adapters of both operands. For a name that both have, the right operand wins."""
        return Adapters(
            tensors={**self.tensors, **other.tensors},
            layers={**self.layers, **other.layers},
            folded={**self.folded, **other.folded},
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check_fits(self, tensors: Mapping[str, Tensor], sender: str) -> None:
        """Makes sure that tensors from a client or a strategy can replace the adapters' tensors.

        Args:
            tensors: The tensors by exported name.
            sender: Name of the client or strategy, for the message.

        Raises:
            RefusedUpdate: A name is missing or unknown, a shape differs, or a value is NaN or infinite.
        """
        different = sorted(tensors.keys() ^ self.tensors.keys())
        if different:
            raise RefusedUpdate(
                f"{sender} sent other layers than it was given: {different[0]} and {len(different) - 1} more"
            )
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise RefusedUpdate(f"{sender} sent {name} as {type(tensor).__name__}, not as a tensor")
            # Equal shapes, to the letter: torch would broadcast a wrong one without a word.
            expected = self.tensors[name].shape
            if tensor.shape != expected:
                raise RefusedUpdate(
                    f"{sender} sent {name} with shape {tuple(tensor.shape)} in place of {tuple(expected)}"
                )
            if not tensor.is_floating_point():
                raise RefusedUpdate(f"{sender} sent {name} as {tensor.dtype}, not as numbers with a fraction")
            if not torch.isfinite(tensor).all():
                raise RefusedUpdate(f"{sender} sent NaN or infinite values in {name}")

    def check_folded(self, sender: str) -> None:
        """Makes sure that the matrices to fold belong to adapted layers, have their shapes and are finite.

        Raises:
            RefusedUpdate: A layer is unknown, a shape differs, or a value is NaN or infinite.
        """
        for layer, change in self.folded.items():
            if layer not in self.layers:
                raise RefusedUpdate(f"{sender} wants to fold something into {layer}, which is no adapted layer")
            a, b = self.factors(layer)
            has_shape_of_layer = change.shape == (b.shape[0], a.shape[1])
            has_one_inner_dimension = change.up.shape[1] == change.down.shape[0]
            if not (has_shape_of_layer and has_one_inner_dimension):
                raise RefusedUpdate(f"{sender} wants to fold a matrix of shape {change.shape} into {layer}")
            are_finite = torch.isfinite(change.up).all() and torch.isfinite(change.down).all()
            if not are_finite:
                raise RefusedUpdate(f"{sender} wants to fold NaN or infinite values into {layer}")


def sure_rank(rank: int, tail: float) -> int:
    """Returns the rank without its tail (see `Task`): floor(tail * rank), at least 1.

    Example:
        >>> sure_rank(8, 0.5)
        4
    """
    rounding = 1e-9  # 0.29 * 100 is 28.999999999999996
    return max(1, math.floor(tail * rank + rounding))


def fresh_factor(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Draws a new factor A (r, in) with PEFT's distribution, from a seed and the layer's name alone.

    Server and clients draw the same factor, so that none has to send the factor.

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
