"""Adapters on a part, by PEFT: add, read, write, count, save; and what was saved, read again.

Those of LoRA are pairs of factors, with a scaling that goes with their rank. Of any other kind there are only tensors
by name, which are read, written and saved alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from fedsplit.adaptation.injection import ADAPTER, exported, inject, make_config, trained_names
from fedsplit.adaptation.methods import draws_fresh, method_of
from fedsplit.config import LoraSettings
from fedsplit.lowrank import LowRank
from fedsplit.model.devices import CPU
from fedsplit.model.families import STACKED, Family
from fedsplit.model.head import HEAD, WEIGHT, WholeHead
from fedsplit.model.kernels import causal_loss, lora_linear
from fedsplit.model.parts import SCORE, Part
from fedsplit.model.quantization import values_in, was_transposed
from fedsplit.model.sources import to_peft
from fedsplit.seeds import derive_seed
from fedsplit.updates import Adapters, Layer, factor_of, fresh_factor

SCORE_WEIGHT = f"{SCORE}.weight"
"""The name of the weight of a head of classes, in a part and in an adapter's file."""


class _FusedLinear(Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's layer with another forward: the same function, in fewer passes over memory."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base, down, up, dropout = (
            self.base_layer,
            self.lora_A[ADAPTER],
            self.lora_B[ADAPTER],
            self.lora_dropout[ADAPTER],
        )
        weight = base.weight if self.fan_in_fan_out else base.weight.t()
        p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        return lora_linear(x, weight, base.bias, down.weight, up.weight, self.scaling[ADAPTER], p)

    def causal_loss(self, hidden: Tensor, labels: Tensor, cap: float | None) -> Tensor:
        """As a head, the mean next-token loss; see `fedsplit.model.kernels.causal_loss`."""
        weight = self.base_layer.weight
        seen = self.lora_dropout[ADAPTER](hidden.to(weight.dtype))
        low = functional.linear(seen, self.lora_A[ADAPTER].weight.to(weight.dtype)) * self.scaling[ADAPTER]
        return causal_loss(hidden, weight, labels, cap, low, self.lora_B[ADAPTER].weight.to(weight.dtype))


def _fuse(part: Part) -> None:
    for module in part.modules():
        # Anything else, such as an adapter of the embedding, stays the library's.
        if type(module) is Linear and not module.lora_variant:
            module.__class__ = _FusedLinear


def _settle_ranks(part: Part) -> None:
    """Makes a constant, in float32, of what AdaLoRA's layers divide by.

    On a base in 16 bits or on a GPU, PEFT gives it that type or device, and by doing so makes a parameter of it that
    trains; it saves none, and an adapter that it opens has the rank there again.
    """
    for module in part.modules():
        if isinstance(module, AdaLoraLayer):
            module.ranknum[ADAPTER].requires_grad_(False)
            module.ranknum[ADAPTER].data = module.ranknum[ADAPTER].data.float()


def fresh_score(shape: Sequence[int], spread: float, seed: int) -> Tensor:
    """A new head (C, D) of classes, as the library draws it, from the run's seed alone: all clients begin with it.

    Args:
        shape: (C, D).
        spread: The standard deviation, the model's `initializer_range`.
        seed: The run's.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", SCORE))
    return torch.empty(*shape).normal_(0.0, spread, generator=generator)


def spread_of(config: Any) -> float:
    """The standard deviation that a model's new heads are drawn with."""
    return float(getattr(config, "initializer_range", None) or getattr(config, "init_std", None) or 0.02)


def add(part: Part, settings: LoraSettings, seed: int, head: str = "frozen") -> None:
    """Puts adapters on a part, in place; its other parameters stay frozen.

    What training starts from depends on the seed, the layer's name and its weight alone, so that it is the same for
    every client and every cut. LoRA's B starts at zero, unless the method takes its start out of the base weight.

    Args:
        part: The part; its base weights must be frozen already.
        settings: The kind of adapter, rank, alpha, dropout and targets.
        seed: The run's seed.
        head: What of the top's head trains, one of `fedsplit.allowed.HEADS`. Where it is tied, the embedding stays as
            it is: an adapter adds to what the shared weight makes, and a head that trains whole gets a copy.
    """
    head = head if part.kind == "top" else "frozen"
    modules = len(settings.targets) > len(part.family.asked(settings.targets)) or not settings.targets
    if (part.blocks and (modules or part.routers)) or head == "lora":
        config = make_config(settings, part.family, seed=seed, head="lora" if head == "lora" else "frozen")
        if not part.routers and "target_parameters" in vars(config):
            config.target_parameters = None  # they are there only in blocks with experts; PEFT would miss them
        inject(part, config, seed)
        _settle_ranks(part)
        part.adapter = trained_names(part)
    if hasattr(part, SCORE):
        _add_score(part, seed)
        part.score.requires_grad_(True)  # PEFT freezes all that is no adapter
        part.adapter |= {SCORE_WEIGHT}
    if head == "full":
        part.lm_head = WholeHead(part.lm_head)
        part.adapter |= {WEIGHT}
    part.train(part.training)  # the modules that are new would otherwise drop, whatever the part does
    if part.fused:
        _fuse(part)
    fresh = draws_fresh(settings)
    for name, parameter in parameters(part).items():
        # PEFT gives it the type of the base; and the fused optimiser pairs elements by their place in memory.
        parameter.data = parameter.data.float().contiguous()
        if fresh and "lora_A" in name:
            parameter.data.copy_(fresh_factor(name, parameter.shape, seed))


def _add_score(part: Part, seed: int) -> None:
    """Gives the head of classes what it begins with; it is trained whole, in float32."""
    weight = part.score.weight
    part.score.weight = nn.Parameter(fresh_score(weight.shape, spread_of(part.config), seed))


def local_parameters(part: Part) -> dict[str, nn.Parameter]:
    """A part's adapter parameters, and those of a head that trains whole, by the names they have in the part."""
    return {name: parameter for name, parameter in part.named_parameters() if name in part.adapter}


def exported_name(part: Part, local: str) -> str:
    """The name that PEFT gives a part's adapter parameter in a file for the unsplit model."""
    return exported(part.whole_name(local))


def parameters(part: Part) -> dict[str, nn.Parameter]:
    """A part's adapter parameters by the names PEFT gives them in a file for the unsplit model."""
    return {exported_name(part, name): parameter for name, parameter in local_parameters(part).items()}


def _has_factors(module: nn.Module) -> TypeGuard[LoraLayer]:
    """Whether a module is a layer of LoRA's, with a pair of factors; AdaLoRA's has three, though it is called one."""
    return isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer)


def _layer_of(module: LoraLayer) -> Layer:
    transposed = bool(module.fan_in_fan_out) or was_transposed(module.base_layer)
    layer = Layer(float(module.lora_alpha[ADAPTER]), transposed, bool(module.use_rslora[ADAPTER]))
    if isinstance(module, ParamWrapper):
        layer = replace(layer, experts=int(module.num_experts), parameter=str(module.parameter_name))
    return layer


def read(*parts: Part) -> Adapters:
    """Copies the adapters of some parts, to the CPU."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Layer] = {}
    for part in parts:
        tensors |= {name: parameter.detach().to(CPU, copy=True) for name, parameter in parameters(part).items()}
        layers |= layers_of(part)
    return Adapters(tensors, layers)


def layers_of(part: Part) -> dict[str, Layer]:
    """The layers of a part that have factors A and B, by their names in the unsplit model.

    A variant of LoRA is left out: it does more than to add s * B @ A.
    """
    return {
        part.whole_name(name): _layer_of(module)
        for name, module in part.named_modules()
        if _has_factors(module) and not module.lora_variant
    }


@torch.no_grad()
def write(tensors: Mapping[str, Tensor], *parts: Part) -> None:
    """Copies adapters into some parts, which take on their rank, and the scaling that goes with it.

    Args:
        tensors: By exported name, exactly those the parts have.
        *parts: The parts.

    Raises:
        KeyError: A part's adapter is missing among the tensors.
    """
    for part in parts:
        resized = False
        for name, parameter in parameters(part).items():
            if parameter.shape == tensors[name].shape:
                parameter.copy_(tensors[name])
            else:
                parameter.data, resized = tensors[name].to(parameter.device, copy=True), True
        if resized:
            rescale(part)


def rescale(part: Part) -> None:
    """Gives every LoRA layer of a part the scaling that goes with the rank of its factors as they are."""
    for module in part.modules():
        if _has_factors(module):
            layer = _layer_of(module)
            module.scaling[ADAPTER] = layer.scaling(module.lora_A[ADAPTER].weight.shape[0] // layer.experts)


def adopt(whole: Adapters, *parts: Part) -> None:
    """Puts a finished adapter of the unsplit model, as `load` reads it, on parts that have one already.

    Every layer takes on the rank and the alpha that it has in the file, and so computes what PEFT makes of the file.

    Args:
        whole: The adapter.
        *parts: The parts; what belongs to others is passed over.

    Raises:
        KeyError: A part's adapter is missing.
    """
    write(whole.tensors, *parts)
    for part in parts:
        for name, module in part.named_modules():
            if isinstance(module, LoraLayer) and (facts := whole.layers.get(part.whole_name(name))) is not None:
                module.lora_alpha[ADAPTER] = facts.alpha
        rescale(part)


@torch.no_grad()
def fold(part: Part, changes: Mapping[str, LowRank]) -> None:
    """Adds matrices to the frozen weights below a part's adapters, for good.

    Args:
        part: The part.
        changes: Matrices (out, in) by layer of the unsplit model; layers of other parts are passed over.

    Raises:
        ValueError: The weights of a layer are quantised, and would have to be so again.
    """
    for name, module in part.named_modules():
        if isinstance(module, LoraLayer) and (change := changes.get(part.whole_name(name))) is not None:
            if name == HEAD:  # the embedding may share its weight, and must not change
                module.base_layer.weight = nn.Parameter(module.base_layer.weight.clone(), requires_grad=False)
            weight = module.base_layer.weight
            if not weight.is_floating_point():
                raise ValueError(f"nothing can be folded into {part.whole_name(name)}, whose weights are quantised")
            narrow = LowRank(change.up.to(weight), change.down.to(weight))
            if module.fan_in_fan_out:
                weight.addmm_(narrow.down.T, narrow.up.T)
            else:
                weight.addmm_(narrow.up, narrow.down)


def base_weights(part: Part, layers: Collection[str]) -> dict[str, Tensor]:
    """Copies the frozen weights below a part's adapters.

    Args:
        part: The part.
        layers: Layers of the unsplit model; layers of other parts are passed over.

    Returns:
        Weights by layer, as the library stores them: (out, in), or (in, out) for GPT-2's Conv1D.
    """
    found = {}
    for name, module in part.named_modules():
        layer = part.whole_name(name)
        if isinstance(module, LoraLayer) and layer in layers:
            found[layer] = module.base_layer.weight.detach().clone()
    return found


@torch.no_grad()
def put_back(part: Part, weights: Mapping[str, Tensor]) -> None:
    """Writes weights from `base_weights` back to their layers."""
    for name, module in part.named_modules():
        layer = part.whole_name(name)
        if isinstance(module, LoraLayer) and layer in weights:
            module.base_layer.weight.copy_(weights[layer])


def count(part: Part, elsewhere: Sequence[Part] = ()) -> dict[str, int]:
    """Counts a part's parameters.

    Args:
        part: The part.
        elsewhere: Parts of the same party; what the part shares with them (a tied head) is not counted again.

    Returns:
        {"total": base and adapters, "trainable": adapters}.
    """
    seen = {id(parameter) for other in elsewhere for parameter in other.parameters()}
    own = [parameter for parameter in part.parameters() if id(parameter) not in seen]
    return {
        "total": sum(values_in(parameter) for parameter in own),
        "trainable": sum(parameter.numel() for parameter in own if parameter.requires_grad),
    }


def save(
    directory: Path,
    whole: Adapters,
    settings: LoraSettings,
    family: Family,
    base: str,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    head: str = "frozen",
) -> None:
    """Writes an adapter that `PeftModel.from_pretrained` opens on the unsplit model.

    What was folded into base weights goes into the factors, whose rank grows by its rank.

    Args:
        directory: Where to; made if it is not there.
        whole: The adapters, by exported name, and what was folded.
        settings: The kind of adapter, rank, alpha, dropout and targets.
        family: The model's family.
        base: The base model's name, for the record, as `--model` has it.
        blocks: The adapted blocks of the unsplit model, where it is not all of them.
        seed: The run's seed.
        head: What of the head trained, where it is among them.
    """
    config = make_config(settings, family, blocks, seed, head)
    if method_of(settings).residual:
        config.init_lora_weights = True  # what was taken out of the base is in the factors, with what was folded
    config.base_model_name_or_path, config.revision = to_peft(base)
    config.inference_mode = True
    if blocks is not None and getattr(config, "target_parameters", None):
        adapted = [whole.weight_name(layer) for layer in whole.layers]
        there = [path for path in config.target_parameters if any(name.endswith(f".{path}") for name in adapted)]
        config.target_parameters = there or None
    if SCORE_WEIGHT in whole.tensors:
        config.task_type, config.modules_to_save = "SEQ_CLS", [SCORE]
    tensors = dict(whole.tensors)
    for layer in whole.complete:
        change = whole.change(layer)
        if layer in whole.folded:
            change = change + whole.folded[layer].to(change.up.dtype)
        elif change.rank == settings.top_rank:
            continue
        key = pattern_name(layer, config)
        config.rank_pattern[key] = change.rank
        config.alpha_pattern[key] = change.rank**0.5 if settings.rslora else change.rank  # a scaling of 1
        tensors |= {f"{layer}.lora_A.weight": change.down.float(), f"{layer}.lora_B.weight": change.up.float()}
    config.save_pretrained(str(directory))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def pattern_name(layer: str, config: PeftConfig) -> str:
    """What PEFT calls a layer where it looks up a rank or an alpha of its own: a router, by its parameter."""
    parameter = f"{layer}.weight"
    return parameter if any(parameter.endswith(f".{path}") for path in config.target_parameters or ()) else layer


_UNDERSTOOD = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
        *("modules_to_save", "init_lora_weights", "fan_in_fan_out"),
    }
)
"""Fields of PEFT's LoraConfig that say no more than which layers get s * B @ A, and how large s is."""

NEUTRAL_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights as they are."""


def beyond_factors(config: PeftConfig, names: Iterable[str]) -> str:
    """Names something that an adapter does beside adding s * B @ A to layers, and beside bringing a head of its own.

    Args:
        config: Its configuration.
        names: Its tensors' names.

    Returns:
        The first such thing; "" where there is none.
    """
    if config.peft_type != "LORA":
        return f"its kind is {getattr(config.peft_type, 'value', config.peft_type)}"
    plain = LoraConfig()
    for entry in dataclasses.fields(plain):
        value = getattr(config, entry.name)
        if entry.name not in _UNDERSTOOD and value != getattr(plain, entry.name):
            return f"{entry.name} is {value}"
    if config.init_lora_weights not in NEUTRAL_STARTS:
        return f"init_lora_weights is {config.init_lora_weights}"
    known, saved = {*names}, {*(config.modules_to_save or ())}
    heads = {f"{head}.weight" for head in (HEAD, SCORE) if head in saved}
    for name in sorted(known - heads):
        layer, factor = name.rpartition(".lora_")[0], factor_of(name)
        if factor is None or not {f"{layer}.lora_{other}.weight" for other in "AB"} <= known:
            return f"it has {name}"
    return ""


def load(directory: Path, skipped: Collection[str] = ()) -> Adapters:
    """Reads an adapter of the unsplit model that `save`, or PEFT itself, wrote; the inverse of `save`.

    What had been folded is in the factors; every layer has the alpha that goes with its own rank. Of an adapter that
    does more, or something else, than to add s * B @ A, there are tensors only, and no layers.

    Args:
        directory: Folder of the adapter.
        skipped: Names of tensors that are left out, as if the file did not have them.
    """
    config = PeftConfig.from_pretrained(str(directory))
    named = load_file(directory / "adapter_model.safetensors")
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in named.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    if beyond_factors(config, tensors):
        return Adapters(tensors, {})
    factored = sorted({name.rpartition(".lora_")[0] for name in tensors if factor_of(name)})
    return Adapters(tensors, {layer: _filed_layer(layer, tensors, config) for layer in factored})


def _filed_layer(name: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> Layer:
    """A layer of an adapter's file."""
    stacked = name.removesuffix(".base_layer").endswith(".experts")
    parameter = _wrapped(name, config) if stacked else "weight"
    place = f"{name.partition('.base_layer')[0]}.{parameter}" if stacked else pattern_name(name, config)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, place), config.lora_alpha)
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, place), config.r)
    experts = tensors[f"{name}.lora_A.weight"].shape[0] // rank if stacked else 1
    transposed = bool(config.fan_in_fan_out) and name != HEAD  # a head is no Conv1D in any family
    return Layer(float(alpha), transposed, bool(config.use_rslora), experts, parameter)


def _wrapped(layer: str, config: PeftConfig) -> str:
    """Which parameter of an experts' module a file's layer stands for; PEFT wraps the first one innermost."""
    asked = {path.rpartition(".")[2] for path in config.target_parameters or ()}
    inwards = [name for name in reversed(STACKED) if name in asked]
    return inwards[layer.count(".base_layer")]
