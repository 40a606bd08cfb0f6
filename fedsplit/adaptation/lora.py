"""Adapters in the layers of a part, by PEFT: adds, reads, writes, counts, saves and loads them.

A LoRA adapter is a pair of factors A and B for each layer, with a scaling that depends on the rank. An adapter of any
other method is treated as a set of named tensors.
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
from fedsplit.lowrank import LowRank
from fedsplit.model.devices import CPU
from fedsplit.model.families import STACKED, Family
from fedsplit.model.head import HEAD, HEAD_WEIGHT, WholeHead
from fedsplit.model.kernels import causal_loss, lora_linear
from fedsplit.model.parts import SCORE, Part
from fedsplit.model.quantization import values_in, was_transposed
from fedsplit.model.sources import to_peft
from fedsplit.seeds import derive_seed
from fedsplit.settings.sections import LoraSettings
from fedsplit.updates import Adapters, Layer, factor_of, fresh_factor

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


@torch.no_grad()
def fold(part: Part, changes: Mapping[str, LowRank]) -> None:
    """Adds matrices to the frozen base weights of a part's adapted layers.

    Args:
        part: The part.
        changes: Matrices (out, in) by layer of the unsplit model. Layers of other parts are ignored.

    Raises:
        ValueError: The weights of a layer are quantised. They would have to be quantised again.
    """
    for name, module in part.named_modules():
        layer = part.unsplit_name(name)
        change = changes.get(layer)
        if not isinstance(module, LoraLayer) or change is None:
            continue
        if name == HEAD:  # an embedding that is tied to the head must not change
            module.base_layer.weight = nn.Parameter(module.base_layer.weight.clone(), requires_grad=False)
        weight = module.base_layer.weight
        if not weight.is_floating_point():
            raise ValueError(f"nothing can be folded into {layer}, whose weights are quantised")
        up = change.up.to(weight)
        down = change.down.to(weight)
        if module.fan_in_fan_out:
            weight.addmm_(down.T, up.T)
        else:
            weight.addmm_(up, down)


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
        layer = part.unsplit_name(name)
        if isinstance(module, LoraLayer) and layer in layers:
            found[layer] = module.base_layer.weight.detach().clone()
    return found


@torch.no_grad()
def put_back(part: Part, weights: Mapping[str, Tensor]) -> None:
    """Writes weights from `base_weights` back to their layers."""
    for name, module in part.named_modules():
        layer = part.unsplit_name(name)
        if isinstance(module, LoraLayer) and layer in weights:
            module.base_layer.weight.copy_(weights[layer])


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


def save(
    directory: Path,
    adapters: Adapters,
    settings: LoraSettings,
    family: Family,
    base: str,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    head: str = "frozen",
) -> None:
    """Writes an adapter that `PeftModel.from_pretrained` opens on the unsplit model.

    Changes that were folded into base weights are added to the factors, whose rank grows by the rank of the change.

    Args:
        directory: Folder to write to. It is created if needed.
        adapters: Adapters by exported name, and the folded changes.
        settings: Method, rank, alpha, dropout and targets.
        family: Record of the model family.
        base: Name of the base model, as in the setting `model`.
        blocks: Numbers of the adapted blocks of the unsplit model; None for all.
        seed: Seed of the run.
        head: How the head was trained, one of `fedsplit.settings.choices.HEADS`.
    """
    config = make_config(settings, family, blocks, seed, head)
    if method_of(settings).residual:
        config.init_lora_weights = True  # the factors contain what training took out of the base
    config.base_model_name_or_path, config.revision = to_peft(base)
    config.inference_mode = True
    if blocks is not None and getattr(config, "target_parameters", None):
        adapted = [adapters.weight_name(layer) for layer in adapters.layers]
        present = [path for path in config.target_parameters if any(name.endswith(f".{path}") for name in adapted)]
        config.target_parameters = present or None
    if SCORE_WEIGHT in adapters.tensors:
        config.task_type = "SEQ_CLS"
        config.modules_to_save = [SCORE]

    # A layer whose rank is not the configuration's gets an entry in the patterns, with a scaling of 1.
    tensors = dict(adapters.tensors)
    for layer in adapters.complete:
        change = adapters.change(layer)
        if layer in adapters.folded:
            change = change + adapters.folded[layer].to(change.up.dtype)
        elif change.rank == settings.top_rank:
            continue
        key = pattern_name(layer, config)
        config.rank_pattern[key] = change.rank
        config.alpha_pattern[key] = change.rank**0.5 if settings.rslora else change.rank
        tensors |= {f"{layer}.lora_A.weight": change.down.float(), f"{layer}.lora_B.weight": change.up.float()}
    config.save_pretrained(str(directory))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def pattern_name(layer: str, config: PeftConfig) -> str:
    """Returns the name of a layer in PEFT's `rank_pattern` and `alpha_pattern`. A router goes by its parameter."""
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
"""Fields of PEFT's LoraConfig that determine only which layers get s * B @ A, and how large s is."""

NEUTRAL_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights as they are."""


def beyond_factors(config: PeftConfig, names: Iterable[str]) -> str:
    """Finds out whether an adapter does more than add s * B @ A to layers, or replace the head.

    Args:
        config: PEFT's configuration of the adapter.
        names: Names of the adapter's tensors.

    Returns:
        A description of the first such thing; "" if there is none.

    Example:
        >>> beyond_factors(LoraConfig(use_dora=True), [])
        'use_dora is True'
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

    tensors = {*names}
    saved_modules = config.modules_to_save or ()
    heads = {f"{head}.weight" for head in (HEAD, SCORE) if head in saved_modules}
    for name in sorted(tensors - heads):
        layer = name.rpartition(".lora_")[0]
        pair = {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}
        if factor_of(name) is None or not pair <= tensors:
            return f"it has {name}"
    return ""


def load(directory: Path, skipped: Collection[str] = ()) -> Adapters:
    """Reads an adapter of the unsplit model that `save` or PEFT wrote.

    Folded changes are in the factors. Every layer has the alpha for its rank. The result has no layers, only tensors,
    for an adapter that does anything but add s * B @ A.

    Args:
        directory: Folder of the adapter.
        skipped: Names of tensors that are left out, as if the file did not have them.

    Example:
        >>> import tempfile
        >>> from fedsplit.model.families import FAMILIES
        >>> folder = Path(tempfile.mkdtemp())
        >>> tensors = {"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 4)}
        >>> tensors["model.layers.0.mlp.up_proj.lora_B.weight"] = torch.ones(8, 2)
        >>> save(folder, Adapters(tensors, {}), LoraSettings(rank=(2,), alpha=4), FAMILIES["llama"], base="org/name")
        >>> load(folder).layers["model.layers.0.mlp.up_proj"].alpha
        4.0
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
    """Returns the facts about one layer of an adapter's file."""
    stacked = name.removesuffix(".base_layer").endswith(".experts")
    parameter = _wrapped(name, config) if stacked else "weight"
    place = f"{name.partition('.base_layer')[0]}.{parameter}" if stacked else pattern_name(name, config)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, place), config.lora_alpha)
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, place), config.r)
    experts = tensors[f"{name}.lora_A.weight"].shape[0] // rank if stacked else 1
    transposed = bool(config.fan_in_fan_out) and name != HEAD  # a head is no Conv1D in any family
    return Layer(float(alpha), transposed, bool(config.use_rslora), experts, parameter)


def _wrapped(layer: str, config: PeftConfig) -> str:
    """Returns the parameter of an experts' module that a file's layer changes. PEFT wraps the first one innermost."""
    asked = {path.rpartition(".")[2] for path in config.target_parameters or ()}
    inwards = [name for name in reversed(STACKED) if name in asked]
    return inwards[layer.count(".base_layer")]
