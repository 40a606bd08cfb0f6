"""Adapters in the layers of a part, by PEFT: adds, reads, writes and counts adapters.

A LoRA adapter is a pair of factors A and B for each layer, with a scaling that depends on the rank. An adapter of any
further method is treated as a set of named tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional

from fedsplit.adaptation.injection import ADAPTER, chosen_targets, exported, inject, make_config, trained_names
from fedsplit.adaptation.methods import draws_fresh
from fedsplit.model.devices import CPU
from fedsplit.model.head import HEAD_WEIGHT, WholeHead
from fedsplit.model.kernels import causal_loss, lora_linear
from fedsplit.model.parts import SCORE, Part
from fedsplit.model.quantization import values_in, was_transposed
from fedsplit.model.tensor_parallel import PieceDropout
from fedsplit.seeds import derive_seed
from fedsplit.settings.sections import LoraSettings
from fedsplit.updates import Adapters, Layer, fresh_factor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCORE_WEIGHT = f"{SCORE}.weight"
"""Name of the weight of a head for classes, in a part and in an adapter's file."""


class _FusedLinear(Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's LoRA layer with a faster forward, `fedsplit.model.kernels.lora_linear`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dropout = self.lora_dropout[ADAPTER]
        is_special = self.disable_adapters or self.merged or args or kwargs
        if is_special or isinstance(dropout, PieceDropout):  # PEFT's code
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        # `lora_linear` takes a weight as (in, out), as a `Conv1D` stores it.
        weight = base.weight if self.fan_in_fan_out else base.weight.t()
        down = self.lora_A[ADAPTER].weight
        up = self.lora_B[ADAPTER].weight
        p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        return lora_linear(x, weight, base.bias, down, up, self.scaling[ADAPTER], p)

    def causal_loss(self, hidden: Tensor, labels: Tensor, cap: float | None) -> Tensor:
        """Computes the mean next-token loss of a head; see `fedsplit.model.kernels.causal_loss`."""
        weight = self.base_layer.weight
        inputs = self.lora_dropout[ADAPTER](hidden.to(weight.dtype))
        down = self.lora_A[ADAPTER].weight.to(weight.dtype)
        up = self.lora_B[ADAPTER].weight.to(weight.dtype)
        # Scaled here, where a row has as many values as the rank, and not as the vocabulary.
        low = functional.linear(inputs, down) * self.scaling[ADAPTER]
        return causal_loss(hidden, weight, labels, cap, low, up)


def _fuse(part: Part) -> None:
    """Replaces the forward of a part's LoRA layers by the faster forward."""
    for module in part.modules():
        # Subclasses and variants, such as an adapter of the embedding, keep the library's code.
        if type(module) is Linear and not module.lora_variant:
            module.__class__ = _FusedLinear


def _settle_ranks(part: Part) -> None:
    """Makes the divisors of AdaLoRA's layers (the ranks) frozen float32 constants again.

    For a base in 16 bits or on a GPU, PEFT moves the ranks to the base's type or device, and thereby makes the ranks
    trainable parameters. A reopened adapter has the constants, since no file of PEFT has the ranks.
    """
    for module in part.modules():
        if isinstance(module, AdaLoraLayer):
            module.ranknum[ADAPTER].requires_grad_(False)
            module.ranknum[ADAPTER].data = module.ranknum[ADAPTER].data.float()


def fresh_score(shape: Sequence[int], spread: float, seed: int) -> Tensor:
    """Draws the initial weight (C, D) of a head for classes from the seed of the run, equal for all clients.

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


def spread_of(config: PretrainedConfig) -> float:
    """Returns the standard deviation of a model's new heads, from the library's configuration."""
    for key in ("initializer_range", "init_std"):  # OPT has `init_std`
        spread = getattr(config, key, None)
        if spread:
            return float(spread)
    return 0.02  # the library's default


def add(part: Part, settings: LoraSettings, seed: int, head: str = "frozen") -> None:
    """Adds adapters to a part, in place. All base weights stay frozen.

    The initial values of a layer depend only on the seed, the layer's name and its weight, so that all clients have
    equal values under every cut. LoRA's B starts at zero, except for methods that start from the base weight.

    Args:
        part: The part, with frozen base weights.
        settings: Method, rank, alpha, dropout and targets.
        seed: Seed of the run.
        head: Training of the top's head, a name in `choices.HEADS`. A tied embedding does not change: "lora" adds to
            the output of the shared weight, and "full" trains a copy of the weight.

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
    _inject(part, settings, seed, head)
    if hasattr(part, SCORE):
        _add_score(part, seed)
        part.score.requires_grad_(True)  # PEFT has frozen all parameters except the adapters'
        part.adapter |= {SCORE_WEIGHT}
    if head == "full":
        part.lm_head = WholeHead(part.lm_head)
        part.adapter |= {HEAD_WEIGHT}
    part.train(part.training)  # new modules start in training mode, with dropout
    if part.fused:
        _fuse(part)
    is_drawn_by_name = draws_fresh(settings)
    for name, parameter in parameters(part).items():
        # PEFT creates adapters in the type of the base. The fused optimiser requires contiguous memory.
        parameter.data = parameter.data.float().contiguous()
        if is_drawn_by_name and "lora_A" in name:
            parameter.data.copy_(fresh_factor(name, parameter.shape, seed))


def _inject(part: Part, settings: LoraSettings, seed: int, head: str) -> None:
    """Injects adapters into the layers of a part, if the part has a layer to adapt. For the arguments see `add`."""
    parameters_asked = part.family.asked(settings.targets)
    asks_for_modules = not settings.targets or len(settings.targets) > len(parameters_asked)
    # PEFT fails without a layer to adapt, and only blocks with routers have the parameters in `parameters_asked`.
    has_adapted_blocks = (asks_for_modules and _has_targets(part, settings)) or (part.blocks and bool(part.routers))
    if not has_adapted_blocks and head != "lora":
        return
    config = make_config(settings, part.family, seed=seed, head="lora" if head == "lora" else "frozen")
    if not part.routers and "target_parameters" in vars(config):
        config.target_parameters = None
    inject(part, config, seed)
    _settle_ranks(part)
    part.adapter = trained_names(part)


def _has_targets(part: Part, settings: LoraSettings) -> bool:
    """Returns whether a part has a layer to adapt. A block of a hybrid model may have none."""
    family = part.family
    names = chosen_targets(settings, family)
    prefix = f"{family.decoder}.{family.blocks}."
    inside = [name for name, _ in part.named_modules() if name.startswith(prefix)]
    return any(name.endswith(f".{target}") for name in inside for target in names)


def _add_score(part: Part, seed: int) -> None:
    """Draws the weight of a head for classes. The whole weight trains, in float32."""
    shape = part.score.weight.shape
    initial = fresh_score(shape, spread_of(part.config), seed)
    part.score.weight = nn.Parameter(initial)


def local_parameters(part: Part) -> dict[str, nn.Parameter]:
    """Returns a part's adapter parameters, including a fully trained head, by name in the part."""
    return {name: parameter for name, parameter in part.named_parameters() if name in part.adapter}


def exported_name(part: Part, local: str) -> str:
    """Returns the name of a part's adapter parameter in a PEFT file for the unsplit model."""
    return exported(part.unsplit_name(local))


def parameters(part: Part) -> dict[str, nn.Parameter]:
    """Returns a part's adapter parameters by name in a PEFT file for the unsplit model."""
    return {exported_name(part, name): parameter for name, parameter in local_parameters(part).items()}


def _has_factors(module: nn.Module) -> TypeGuard[LoraLayer]:
    """Returns True for a LoRA layer with a pair of factors. AdaLoRA's layer, a subclass, has three factors."""
    return isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer)


def _layer_of(module: LoraLayer) -> Layer:
    layer = Layer(
        alpha=float(module.lora_alpha[ADAPTER]),
        transposed=bool(module.fan_in_fan_out) or was_transposed(module.base_layer),
        rslora=bool(module.use_rslora[ADAPTER]),
    )
    if isinstance(module, ParamWrapper):
        layer = replace(layer, experts=int(module.num_experts), parameter=str(module.parameter_name))
    return layer


def read(*parts: Part) -> Adapters:
    """Copies the adapters of parts to the CPU."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Layer] = {}
    for part in parts:
        for name, parameter in parameters(part).items():
            # A copy, since training changes the parameters in place.
            tensors[name] = parameter.detach().to(CPU, copy=True)
        layers |= layers_of(part)
    return Adapters(tensors, layers)


def layers_of(part: Part) -> dict[str, Layer]:
    """Returns the layers of a part with factors A and B, by name in the unsplit model.

    Layers of LoRA variants are left out, since a variant does more than add s * B @ A.
    """
    layers = {}
    for name, module in part.named_modules():
        if _has_factors(module) and not module.lora_variant:
            layers[part.unsplit_name(name)] = _layer_of(module)
    return layers


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
                # `data`: the parameter must stay the object that PEFT's layer and the optimiser hold.
                parameter.data = tensors[name].to(parameter.device, copy=True)
                resized = True
        if resized:
            rescale(part)


def rescale(part: Part) -> None:
    """Sets the scaling of every LoRA layer of a part by the current rank of the layer's factors."""
    for module in part.modules():
        if _has_factors(module):
            layer = _layer_of(module)
            rank = module.lora_A[ADAPTER].weight.shape[0] // layer.experts
            module.scaling[ADAPTER] = layer.scaling(rank)


def adopt(adapters: Adapters, *parts: Part) -> None:
    """Copies an adapter of the unsplit model into parts with an adapter.

    Layers take on the rank and the alpha of the file, so that parts compute the same as PEFT with the file.

    Args:
        adapters: Adapter of the unsplit model, from `adapter_files.load`.
        *parts: The parts. Tensors of further parts are ignored.

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
        elsewhere: Further parts of the party. A shared parameter (a tied head) is not counted again.

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
    counted_elsewhere = {id(parameter) for other in elsewhere for parameter in other.parameters()}
    remaining = [parameter for parameter in part.parameters() if id(parameter) not in counted_elsewhere]
    return {
        "total": sum(values_in(parameter) for parameter in remaining),
        "trainable": sum(parameter.numel() for parameter in remaining if parameter.requires_grad),
    }
