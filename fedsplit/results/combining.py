"""Combines several LoRA adapters into one, by PEFT."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from fedsplit.adaptation.lora import SCORE_WEIGHT
from fedsplit.durable import write_folder
from fedsplit.errors import InputError
from fedsplit.model.head import HEAD_WEIGHT
from fedsplit.model.sources import to_peft
from fedsplit.results.finished import ADAPTER_FILES, Adapter, check_same_base
from fedsplit.results.fitting import more_than_factors, read_fitting, reason_of
from fedsplit.results.merging import check_mergeable
from fedsplit.results.whole import open_base
from fedsplit.tensor_files import write_tensors
from fedsplit.updates import Adapters

_COMBINED = "combined"
"""Name of the sum among the adapters of the model."""


def _check_headless(adapter: Adapter, tensors: Adapters) -> None:
    """Checks that an adapter has no classification head. A head is no pair of factors, and PEFT cannot combine heads.

    Raises:
        InputError: The adapter has a classification head.
    """
    if SCORE_WEIGHT in tensors.tensors:
        reason = "which PEFT cannot combine: merge it alone"
        raise InputError(f"the adapter in {adapter.folder} has a head of classes, {reason}")


def _check_linear(all_adapters: Sequence[Adapters]) -> None:
    """Checks that adapters have factors of equal shapes, as "linear" needs.

    Raises:
        InputError: A shape differs, or an adapter lacks a factor.
    """
    first, *others = all_adapters
    for other in others:
        for name in sorted({*first.tensors, *other.tensors}):
            left = first.tensors.get(name)
            right = other.tensors.get(name)
            if left is None or right is None or left.shape != right.shape:
                raise InputError(f"linear needs adapters of the same ranks and layers; {name} differs: use cat or svd")


def _check_combinable(adapter: Adapter, tensors: Adapters) -> None:
    """Checks that an adapter is a LoRA with factors that PEFT can add up.

    Raises:
        InputError: The adapter is of a different kind, or holds more than factors.
    """
    _check_headless(adapter, tensors)
    check_mergeable(adapter, tensors)
    if not tensors.layers:  # `read_fitting` returns no layers for an adapter with further effects
        reason = f"it is no LoRA, or does more than add B A to weights ({more_than_factors(adapter)})"
        raise InputError(f"{adapter.folder} cannot be combined: {reason}")
    if HEAD_WEIGHT in tensors.tensors:
        raise InputError(f"the adapter in {adapter.folder} holds a whole head, which PEFT cannot combine")


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    how: str,
    out: Path,
    rank: int | None = None,
) -> int:
    """Writes the weighted sum of adapters as one adapter, by PEFT's `add_weighted_adapter`.

    Args:
        adapters: Two adapters or more, of one base model.
        weights: Weight of each adapter.
        how: "cat" stacks the factors, an exact sum. "svd" is the best fit of a rank. "linear" adds the factors, and the
            result differs from the sum of the changes.
        out: Folder to write.
        rank: Rank of "svd"; None for the largest rank of the adapters.

    Returns:
        The largest rank of the written adapter.

    Raises:
        InputError: The adapters belong to different models, do not fit, or cannot be combined in the way of `how`.
    """
    all_tensors = _read_combinable(adapters, how)
    layers = {layer for tensors in all_tensors for layer in tensors.complete}
    model = _model_with(adapters, layers)
    names = list(model.peft_config)
    try:
        model.add_weighted_adapter(names, list(weights), _COMBINED, combination_type=how, svd_rank=rank)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"the adapters cannot be combined ({reason_of(error)})") from None

    factors, ranks = _trimmed(get_peft_model_state_dict(model, adapter_name=_COMBINED))
    # PEFT skips a layer silently if a configuration does not target it. A sum without a layer would be wrong.
    lost = sorted(layers ^ ranks.keys())
    if lost:
        raise InputError(f"the adapters cannot be combined: PEFT leaves out {lost[0]}")
    # PEFT would write the value of the last layer for all layers.
    is_transposed = any(layer.transposed for layer in all_tensors[0].layers.values())
    config = _config_for(model.peft_config[_COMBINED], ranks, adapters[0], is_transposed)

    def fill(draft: Path) -> None:
        config.save_pretrained(str(draft))
        write_tensors(draft / ADAPTER_FILES[1], factors)

    write_folder(out, fill)
    return max(ranks.values())


def _read_combinable(adapters: Sequence[Adapter], how: str) -> list[Adapters]:
    """Reads adapters, and checks that the adapters can be combined.

    Raises:
        InputError: The adapters belong to different models, do not fit, or cannot be combined in the way of `how`.
    """
    check_same_base(adapters)
    all_tensors = [read_fitting(adapter) for adapter in adapters]
    for adapter, tensors in zip(adapters, all_tensors, strict=True):
        _check_combinable(adapter, tensors)
    if how == "linear":
        _check_linear(all_tensors)
    for adapter in adapters:
        document = json.loads((adapter.folder / ADAPTER_FILES[0]).read_text())
        if document.get("target_parameters"):
            reason = "nor on routers: PEFT adds up no such factors"
            raise InputError(f"adapters on the experts' stacked weights cannot be combined, {reason}")
    return all_tensors


def _model_with(adapters: Sequence[Adapter], layers: Collection[str]) -> PeftModel:
    """Returns the base model in float32, with all adapters attached under names of their order.

    Args:
        adapters: The adapters.
        layers: Layers of all adapters.
    """
    base = open_base(adapters[0].model_path, adapters[0].dtype, dense=True).float()
    names = [f"number{index}" for index in range(len(adapters))]
    model = PeftModel.from_pretrained(base, str(adapters[0].folder), adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(adapter.folder), adapter_name=name)
    _target_alike(list(model.peft_config.values()), layers)
    return model


def _config_for(
    combined: PeftConfig,
    ranks: Mapping[str, int],
    first: Adapter,
    is_transposed: bool,
) -> PeftConfig:
    """Returns the configuration of the combined adapter.

    Args:
        combined: PEFT's configuration of the sum.
        ranks: Rank of each layer after trimming.
        first: One of the adapters, which names the base model of all.
        is_transposed: True for a model with transposed layers.
    """
    largest = max(ranks.values())
    smaller = {layer: rank for layer, rank in ranks.items() if rank != largest}
    name, revision = to_peft(first.model, first.dtype)
    return replace(
        combined,
        r=largest,
        lora_alpha=largest,  # a scaling of 1 in every layer: PEFT has put the adapters' scalings into the factors
        use_rslora=False,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        base_model_name_or_path=name,
        revision=revision,
        inference_mode=True,
        fan_in_fan_out=is_transposed,
    )


def _target_alike(configs: Sequence[PeftConfig], layers: Collection[str]) -> None:
    """Makes all configurations target the layers of all adapters, unless the targets are equal already.

    PEFT builds the sum for the layers of the first configuration, and would leave out the further layers of later
    adapters.
    """
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    choices = [[getattr(config, name) for name in fields] for config in configs]
    if all(choice == choices[0] for choice in choices):
        return
    for config in configs:
        config.target_modules = set(layers)
        for restriction in fields[1:]:
            setattr(config, restriction, None)


def _trimmed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Cuts off the zeros with which PEFT pads factors to the largest rank.

    Returns:
        The factors by name, and the rank of each layer.
    """
    trimmed: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for a_name in tensors:
        layer, is_factor_a, _ = a_name.partition(".lora_A.")
        if not is_factor_a:
            continue
        b_name = f"{layer}.lora_B.weight"
        a = tensors[a_name]
        b = tensors[b_name]

        is_used = (a != 0).any(1) | (b != 0).any(0)
        rank = 1  # PEFT has no rank 0
        if bool(is_used.any()):
            # Only the end is padding. A rank of zeros between others is an adapter's own.
            last_used = int(is_used.nonzero().max())
            rank = last_used + 1
        trimmed[a_name] = a[:rank]
        trimmed[b_name] = b[:, :rank]
        ranks[layer.removeprefix("base_model.model.")] = rank
    return trimmed, ranks
