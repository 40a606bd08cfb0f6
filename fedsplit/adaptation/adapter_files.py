"""Writes and reads adapters of the unsplit model in PEFT's file format."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsplit.adaptation.injection import make_config
from fedsplit.adaptation.lora import SCORE_WEIGHT
from fedsplit.adaptation.methods import method_of
from fedsplit.model.families import STACKED, Family
from fedsplit.model.head import HEAD
from fedsplit.model.parts import SCORE
from fedsplit.model.sources import to_peft
from fedsplit.settings.config import Config
from fedsplit.settings.sections import LoraSettings
from fedsplit.updates import Adapters, Layer, factor_of


def save(
    directory: Path,
    adapters: Adapters,
    settings: LoraSettings,
    family: Family,
    base: str,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    head: str = "frozen",
    dtype: str = Config.dtype,
) -> None:
    """Writes an adapter for `PeftModel.from_pretrained` on the unsplit model.

    Changes that were folded into base weights are added to the factors. The rank of the factors grows by the rank of
    the change.

    Args:
        directory: Folder to write to. It is created if needed.
        adapters: Adapters by exported name, and the folded changes.
        settings: Method, rank, alpha, dropout and targets.
        family: Record of the model family.
        base: Name of the base model, in the form of the setting `model`.
        blocks: Numbers of the adapted blocks of the unsplit model; None for all.
        seed: Seed of the run.
        head: Training of the head, a name in `fedsplit.settings.choices.HEADS`.
        dtype: Type of the run's base weights, a name in `fedsplit.settings.choices.DTYPES`.
    """
    config = _file_config(adapters, settings, family, blocks, seed, head)
    config.base_model_name_or_path, config.revision = to_peft(base, dtype)
    tensors = dict(adapters.tensors)
    for layer in adapters.complete:
        change = adapters.change(layer)
        if layer in adapters.folded:
            change = change + adapters.folded[layer].to(change.up.dtype)
        elif change.rank == settings.top_rank:
            continue
        # A layer with a different rank from the configuration's gets an entry in the patterns, with a scaling of 1.
        key = pattern_name(layer, config)
        config.rank_pattern[key] = change.rank
        # The factors of a change contain the scaling. rsLoRA divides alpha by the root of the rank, plain LoRA by the
        # rank.
        config.alpha_pattern[key] = change.rank**0.5 if settings.rslora else change.rank
        tensors[f"{layer}.lora_A.weight"] = change.down.float()
        tensors[f"{layer}.lora_B.weight"] = change.up.float()
    config.save_pretrained(str(directory))
    # safetensors writes contiguous tensors only.
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _file_config(
    adapters: Adapters,
    settings: LoraSettings,
    family: Family,
    blocks: Sequence[int] | None,
    seed: int,
    head: str,
) -> PeftConfig:
    """Returns PEFT's configuration for a file. For the arguments see `save`."""
    config = make_config(settings, family, blocks, seed, head)
    config.inference_mode = True
    if method_of(settings).residual:
        config.init_lora_weights = True  # the factors contain the part that training took out of the base
    if blocks is not None and getattr(config, "target_parameters", None):
        # PEFT fails on a parameter that no block has, and a part may have no block with experts.
        adapted = [adapters.weight_name(layer) for layer in adapters.layers]
        present = []
        for path in config.target_parameters:
            if any(name.endswith(f".{path}") for name in adapted):
                present.append(path)
        config.target_parameters = present or None
    if SCORE_WEIGHT in adapters.tensors:
        config.task_type = "SEQ_CLS"
        config.modules_to_save = [SCORE]
    return config


def pattern_name(layer: str, config: PeftConfig) -> str:
    """Returns the name of a layer in PEFT's `rank_pattern` and `alpha_pattern`. A router goes by its parameter."""
    parameter = f"{layer}.weight"
    is_adapted_parameter = any(parameter.endswith(f".{path}") for path in config.target_parameters or ())
    return parameter if is_adapted_parameter else layer


_UNDERSTOOD = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
        *("modules_to_save", "init_lora_weights", "fan_in_fan_out"),
    }
)
"""Fields of PEFT's LoraConfig without an effect beyond s * B @ A: the fields select layers, or set s."""


NEUTRAL_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights unchanged."""


def beyond_factors(config: PeftConfig, names: Iterable[str]) -> str:
    """Finds the first effect of an adapter beyond adding s * B @ A to layers, or replacing the head.

    Args:
        config: PEFT's configuration of the adapter.
        names: Names of the adapter's tensors.

    Returns:
        A description of the effect; "" without an effect.

    Example:
        >>> beyond_factors(LoraConfig(use_dora=True), [])
        'use_dora is True'
    """
    if config.peft_type != "LORA":
        return f"its kind is {getattr(config.peft_type, 'value', config.peft_type)}"
    plain = LoraConfig()
    for entry in dataclasses.fields(plain):
        value = getattr(config, entry.name)
        # A field that a later PEFT brings counts as an effect, until this module knows it.
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
    """Reads an adapter of the unsplit model, written by `save` or PEFT.

    Folded changes are in the factors. Every layer has the alpha for the layer's rank. If the adapter does more than add
    s * B @ A (see `beyond_factors`), the result has tensors and no layers.

    Args:
        directory: Folder of the adapter.
        skipped: Names of tensors to leave out.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from fedsplit.model.derivation import family_of, text_config
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> folder = Path(tempfile.mkdtemp())
        >>> tensors = {"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 4)}
        >>> tensors["model.layers.0.mlp.up_proj.lora_B.weight"] = torch.ones(8, 2)
        >>> settings, family = LoraSettings(rank=(2,), alpha=4), family_of(text_config(BUNDLED_MODEL))
        >>> save(folder, Adapters(tensors, {}), settings, family, base="org/name")
        >>> load(folder).layers["model.layers.0.mlp.up_proj"].alpha
        4.0
    """
    config = PeftConfig.from_pretrained(str(directory))
    named = load_file(directory / "adapter_model.safetensors")
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in named.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    if beyond_factors(config, tensors):
        return Adapters(tensors, {})
    names = sorted({name.rpartition(".lora_")[0] for name in tensors if factor_of(name)})
    return Adapters(tensors, {name: _layer_in_file(name, tensors, config) for name in names})


def _layer_in_file(name: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> Layer:
    """Returns the constants of one layer of an adapter's file."""
    # The factors of all experts are stacked along the rank, so that the number of experts follows from the shape.
    is_stacked = name.removesuffix(".base_layer").endswith(".experts")
    if is_stacked:
        parameter = _wrapped_parameter(name, config)
        place = f"{name.partition('.base_layer')[0]}.{parameter}"
    else:
        parameter = "weight"
        place = pattern_name(name, config)

    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, place), config.lora_alpha)
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, place), config.r)
    return Layer(
        alpha=float(alpha),
        transposed=bool(config.fan_in_fan_out) and name != HEAD,  # a head is no Conv1D in any family
        rslora=bool(config.use_rslora),
        experts=tensors[f"{name}.lora_A.weight"].shape[0] // rank if is_stacked else 1,
        parameter=parameter,
    )


def _wrapped_parameter(layer: str, config: PeftConfig) -> str:
    """Returns the parameter of an experts' module that a file's layer changes.

    PEFT wraps the module once for each parameter, the first parameter innermost. Every wrapper outside of a layer's
    wrapper adds `.base_layer` to the layer's name.
    """
    asked = {path.rpartition(".")[2] for path in config.target_parameters or ()}
    from_outside = [name for name in reversed(STACKED) if name in asked]
    return from_outside[layer.count(".base_layer")]
