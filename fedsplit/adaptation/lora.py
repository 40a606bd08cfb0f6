"""Adapters in the layers of a part, by PEFT: adds, reads, writes, counts, saves and loads them.

A LoRA adapter is a pair of factors A and B for each layer, with a scaling that depends on the rank. An adapter of any
other method is treated as a set of named tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional

from fedsplit.adaptation.injection import ADAPTER, exported, inject, make_config, trained_names
from fedsplit.adaptation.methods import draws_fresh
from fedsplit.model.devices import CPU
from fedsplit.model.head import HEAD_WEIGHT, WholeHead
from fedsplit.model.kernels import causal_loss, lora_linear
from fedsplit.model.parts import SCORE, Part
from fedsplit.model.quantization import values_in, was_transposed
from fedsplit.seeds import derive_seed
from fedsplit.settings.sections import LoraSettings
from fedsplit.updates import Adapters, Layer, fresh_factor

SCORE_WEIGHT = f"{SCORE}.weight"
"""Name of the weight of a head for classes, in a part and in an adapter's file."""


class _FusedLinear(Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's LoRA layer with a faster forward, `fedsplit.model.kernels.lora_linear`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        weight = base.weight if self.fan_in_fan_out else base.weight.t()
        down = self.lora_A[ADAPTER].weight
        up = self.lora_B[ADAPTER].weight
        dropout = self.lora_dropout[ADAPTER]
        p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        return lora_linear(x, weight, base.bias, down, up, self.scaling[ADAPTER], p)

    def causal_loss(self, hidden: Tensor, labels: Tensor, cap: float | None) -> Tensor:
        """Computes the mean next-token loss of a head; see `fedsplit.model.kernels.causal_loss`."""
        weight = self.base_layer.weight
        inputs = self.lora_dropout[ADAPTER](hidden.to(weight.dtype))
        low = functional.linear(inputs, self.lora_A[ADAPTER].weight.to(weight.dtype)) * self.scaling[ADAPTER]
        return causal_loss(hidden, weight, labels, cap, low, self.lora_B[ADAPTER].weight.to(weight.dtype))


def _fuse(part: Part) -> None:
    """Replaces the forward of a part's LoRA layers by the faster one."""
    for module in part.modules():
        # Subclasses and variants, such as an adapter of the embedding, keep the library's code.
        if type(module) is Linear and not module.lora_variant:
            module.__class__ = _FusedLinear


def _settle_ranks(part: Part) -> None:
    """Restores the ranks by which AdaLoRA's layers divide to frozen float32 constants.

    For a base in 16 bits or on a GPU, PEFT moves them to that type or device, and thereby turns them into trainable
    parameters. They are in no file of PEFT's, so an adapter that is opened again has the constants.
    """
    for module in part.modules():
        if isinstance(module, AdaLoraLayer):
            module.ranknum[ADAPTER].requires_grad_(False)
            module.ranknum[ADAPTER].data = module.ranknum[ADAPTER].data.float()


def fresh_score(shape: Sequence[int], spread: float, seed: int) -> Tensor:
    """Draws the initial weight (C, D) of a head for classes from the seed of the run. All clients start with it.

    Args:
        shape: (C, D).
        spread: Standard deviation, the model's `initializer_range`.
        seed: Seed of the run.

    Example:
        >>> torch.equal(fresh_score((2, 4), 0.02, seed=1), fresh_score((2, 4), 0.02, seed=1))
        True
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", SCORE))
    return torch.empty(*shape).normal_(0.0, spread, generator=generator)


def spread_of(config: Any) -> float:
    """Returns the standard deviation of a model's new heads, from the library's configuration."""
    return float(getattr(config, "initializer_range", None) or getattr(config, "init_std", None) or 0.02)


def add(part: Part, settings: LoraSettings, seed: int, head: str = "frozen") -> None:
    """Adds adapters to a part, in place. All other parameters stay frozen.

    The initial values of a layer depend only on the seed, the layer's name and its weight. So they are the same for
    every client and every cut. LoRA's B starts at zero, except for methods that start from the base weight.

    Args:
        part: The part. Its base weights must be frozen already.
        settings: Method, rank, alpha, dropout and targets.
        seed: Seed of the run.
        head: How the top's head trains, one of `choices.HEADS`. An embedding that is tied to the head does
            not change: "lora" adds to the output of the shared weight, and "full" trains a copy of the weight.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> from fedsplit.model.split import load_parts
        >>> (bottom,) = load_parts(BUNDLED_MODEL, (1, 5), ["bottom"])
        >>> add(bottom, LoraSettings(targets=("c_attn",)), seed=0)
        >>> list(parameters(bottom))
        ['transformer.h.0.attn.c_attn.lora_A.weight', 'transformer.h.0.attn.c_attn.lora_B.weight']
    """
    if part.kind != "top":
        head = "frozen"
    modules = len(settings.targets) > len(part.family.asked(settings.targets)) or not settings.targets
    if (part.blocks and (modules or part.routers)) or head == "lora":
        config = make_config(settings, part.family, seed=seed, head="lora" if head == "lora" else "frozen")
        if not part.routers and "target_parameters" in vars(config):
            config.target_parameters = None  # only blocks with experts have them; PEFT fails if none is there
        inject(part, config, seed)
        _settle_ranks(part)
        part.adapter = trained_names(part)
    if hasattr(part, SCORE):
        _add_score(part, seed)
        part.score.requires_grad_(True)  # PEFT froze everything but the adapters
        part.adapter |= {SCORE_WEIGHT}
    if head == "full":
        part.lm_head = WholeHead(part.lm_head)
        part.adapter |= {HEAD_WEIGHT}
    part.train(part.training)  # new modules start in training mode, with dropout
    if part.fused:
        _fuse(part)
    fresh = draws_fresh(settings)
    for name, parameter in parameters(part).items():
        # PEFT creates adapters in the type of the base. The fused optimiser requires contiguous memory.
        parameter.data = parameter.data.float().contiguous()
        if fresh and "lora_A" in name:
            parameter.data.copy_(fresh_factor(name, parameter.shape, seed))


def _add_score(part: Part, seed: int) -> None:
    """Draws the weight of a head for classes. All of it trains, in float32."""
    weight = part.score.weight
    part.score.weight = nn.Parameter(fresh_score(weight.shape, spread_of(part.config), seed))


def local_parameters(part: Part) -> dict[str, nn.Parameter]:
    """Returns a part's adapter parameters, including a fully trained head, by their names in the part."""
    return {name: parameter for name, parameter in part.named_parameters() if name in part.adapter}


def exported_name(part: Part, local: str) -> str:
    """Returns the name of a part's adapter parameter in a PEFT file for the unsplit model."""
    return exported(part.unsplit_name(local))


def parameters(part: Part) -> dict[str, nn.Parameter]:
    """Returns a part's adapter parameters by their names in a PEFT file for the unsplit model."""
    return {exported_name(part, name): parameter for name, parameter in local_parameters(part).items()}


def _has_factors(module: nn.Module) -> TypeGuard[LoraLayer]:
    """Returns True for a LoRA layer with a pair of factors. AdaLoRA's layer, a subclass, has three factors."""
    return isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer)


def _layer_of(module: LoraLayer) -> Layer:
    transposed = bool(module.fan_in_fan_out) or was_transposed(module.base_layer)
    layer = Layer(float(module.lora_alpha[ADAPTER]), transposed, bool(module.use_rslora[ADAPTER]))
    if isinstance(module, ParamWrapper):
        layer = replace(layer, experts=int(module.num_experts), parameter=str(module.parameter_name))
    return layer


def read(*parts: Part) -> Adapters:
    """Copies the adapters of parts to the CPU."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Layer] = {}
    for part in parts:
        tensors |= {name: parameter.detach().to(CPU, copy=True) for name, parameter in parameters(part).items()}
        layers |= layers_of(part)
    return Adapters(tensors, layers)


def layers_of(part: Part) -> dict[str, Layer]:
    """Returns the layers of a part that have factors A and B, by their names in the unsplit model.

    Layers of LoRA variants are left out, since they do more than add s * B @ A.
    """
    return {
        part.unsplit_name(name): _layer_of(module)
        for name, module in part.named_modules()
        if _has_factors(module) and not module.lora_variant
    }


@torch.no_grad()
def write(tensors: Mapping[str, Tensor], *parts: Part) -> None:
    """Copies adapters into parts. Layers take on the rank of the tensors, and the scaling for this rank.

    Args:
        tensors: Tensors of all adapters of the parts, by exported name.
        *parts: The parts.

    Raises:
        KeyError: A tensor is missing.
    """
    for part in parts:
        resized = False
        for name, parameter in parameters(part).items():
            if parameter.shape == tensors[name].shape:
                parameter.copy_(tensors[name])
            else:
                parameter.data = tensors[name].to(parameter.device, copy=True)
                resized = True
        if resized:
            rescale(part)


def rescale(part: Part) -> None:
    """Sets the scaling of every LoRA layer of a part to the one for the current rank of its factors."""
    for module in part.modules():
        if _has_factors(module):
            layer = _layer_of(module)
            module.scaling[ADAPTER] = layer.scaling(module.lora_A[ADAPTER].weight.shape[0] // layer.experts)


def adopt(adapters: Adapters, *parts: Part) -> None:
    """Copies an adapter of the unsplit model, as `load` reads it, into parts that have an adapter already.

    Layers take on the rank and the alpha of the file. So the parts compute what PEFT computes with the file.

    Args:
        adapters: Adapter of the unsplit model.
        *parts: The parts. Tensors of other parts are ignored.

    Raises:
        KeyError: A tensor is missing.
    """
    write(adapters.tensors, *parts)
    for part in parts:
        for name, module in part.named_modules():
            layer = adapters.layers.get(part.unsplit_name(name))
            if isinstance(module, LoraLayer) and layer is not None:
                module.lora_alpha[ADAPTER] = layer.alpha
        rescale(part)


def count(part: Part, elsewhere: Sequence[Part] = ()) -> dict[str, int]:
    """Counts a part's parameters.

    Args:
        part: The part.
        elsewhere: Other parts of the same party. Parameters that the part shares with them (a tied head) are not
            counted.

    Returns:
        {"total": base and adapters, "trainable": adapters}.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> from fedsplit.model.split import load_parts
        >>> (trunk,) = load_parts(BUNDLED_MODEL, (1, 5), ["trunk"])
        >>> add(trunk, LoraSettings(), seed=0)
        >>> count(trunk)
        {'total': 858624, 'trainable': 65536}
    """
    counted = {id(parameter) for other in elsewhere for parameter in other.parameters()}
    remaining = [parameter for parameter in part.parameters() if id(parameter) not in counted]
    return {
        "total": sum(values_in(parameter) for parameter in remaining),
        "trainable": sum(parameter.numel() for parameter in remaining if parameter.requires_grad),
    }
