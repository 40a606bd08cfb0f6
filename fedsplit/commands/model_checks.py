"""Checks that settings suit the model, before any weight is loaded.

Checks that concern one module only are `check_` functions in that module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedsplit.adaptation.methods import ADAPTER_METHODS, check_method
from fedsplit.adaptation.rank_budget import check_budget
from fedsplit.errors import SettingError, check_all
from fedsplit.federation.strategy import traits_of
from fedsplit.model.facts import Facts
from fedsplit.model.families import STACKED
from fedsplit.model.head import HEAD
from fedsplit.model.sharing import listed
from fedsplit.model.sources import config_folder
from fedsplit.model.token_ids import check_largest
from fedsplit.model.vocabulary import load_tokenizer
from fedsplit.settings.choices import PARTS
from fedsplit.settings.config import Config
from fedsplit.trunk.schedules import SCHEDULES

if TYPE_CHECKING:
    from fedsplit.corpora.sharding import Partition


def learning_parts(config: Config, blocks: int) -> list[str]:
    """Returns the parts that have trainable parameters and get gradients under the schedule.

    Args:
        config: Settings of the run.
        blocks: Number of blocks of the model.

    Example:
        >>> learning_parts(Config(cut="0:5"), blocks=6)
        ['trunk', 'top']
    """
    schedule = SCHEDULES[config.trunk.schedule]
    low, high = config.bounds
    if config.prompt.virtual:  # only the virtual tokens are trained, and the bottom holds them
        return ["bottom"] if schedule.returns_gradient else []

    parts = []
    if low > 0 and schedule.returns_gradient:
        parts.append("bottom")
    if schedule.learns:
        parts.append("trunk")
    if high < blocks or config.lm_head != "frozen":
        parts.append("top")
    return parts


def check_cut(config: Config, facts: Facts) -> None:
    """Checks that the model has the blocks of the cut, that it parts no shared keys and values, and that a part learns.

    Raises:
        SettingError: The cut lies outside the model, parts blocks that belong together, or no part learns.
    """
    _, high = config.bounds
    if high > facts.blocks:
        raise SettingError("cut", config.cut, f"LO:HI with 0 <= LO < HI <= {facts.blocks}, the model's blocks")
    places = [place for place in range(facts.blocks + 1) if place not in facts.closed]
    allowed = f"bounds among {listed(places)}: between the others, blocks read keys and values of earlier blocks"
    if facts.closed.intersection(config.bounds):
        raise SettingError("cut", config.cut, allowed)
    if facts.closed.intersection(config.trunk.stage_bounds):
        raise SettingError("trunk.stages", config.trunk.stages, allowed)
    if learning_parts(config, facts.blocks):
        return
    # No part learns. The message names the setting that the user can change.
    if config.prompt.virtual:
        allowed = f"a schedule that returns gradients, with --prompt.kind {config.prompt.kind}: nothing else learns"
        raise SettingError("trunk.schedule", config.trunk.schedule, allowed)
    allowed = f"a cut that leaves blocks to a part that learns under the trunk schedule {config.trunk.schedule}"
    raise SettingError("cut", config.cut, allowed)


def check_lengths(config: Config, facts: Facts) -> None:
    """Checks that the model has a position for every token of a sequence.

    Raises:
        SettingError: Sequences are longer than the model allows.
    """
    length = config.train.max_length
    if length > facts.positions:
        raise SettingError("train.max_length", length, f"8 to {facts.positions}, the model's positions")
    positions = config.prompt.positions
    if positions and length + positions > facts.positions:
        allowed = f"at most the model's {facts.positions} positions together with train.max_length {length}"
        raise SettingError("prompt.tokens", positions, allowed)


def check_tokens(config: Config, partition: Partition) -> None:
    """Checks that the model's embedding has a row for every token of the clients' texts and of the prompt's text.

    Args:
        config: Settings of the run.
        partition: The clients' data.

    Raises:
        SettingError: The embedding has fewer rows.
    """
    folder = config_folder(config.model)
    largest = []
    for shard in partition.shards:
        largest.append(int(shard.train.ids.max()))
        largest.append(int(shard.held_out.ids.max()))
    if config.prompt.text:
        largest += load_tokenizer(folder)(config.prompt.text)["input_ids"]
    if largest:  # sites check their texts themselves
        check_largest(folder, config.model, max(largest))


def check_adapters(config: Config, facts: Facts) -> None:
    """Checks that the adapter method works with the targets, the head and the quantisation of the run.

    Raises:
        InputError: The method does not work with the targets, the head or the quantisation. All errors are reported
            together.
    """
    if config.lm_head != "frozen" and facts.family.head != HEAD:
        allowed = f"frozen for a model whose head is called {facts.family.head}"
        raise SettingError("lm_head", config.lm_head, allowed)
    if config.lm_head == "full" and facts.family.biased_head:  # PEFT's file would need the bias, which is not trained
        raise SettingError("lm_head", config.lm_head, "frozen | lora for a model whose head has a bias")
    check_method(config, facts.family.transposed)
    check_budget(config)
    check_all(_wrong_bits(config, facts), _wrong_with_method(config), _wrong_targets(config, facts))


def _wrong_bits(config: Config, facts: Facts) -> Iterator[SettingError]:
    """Yields an error for bits other than those in which the checkpoint has its weights."""
    if facts.bits and config.bits != dict.fromkeys(PARTS, facts.bits):
        needed = ",".join(f"{part}:{facts.bits}" for part in PARTS)
        allowed = f"{needed} for a model whose weights are in {facts.bits} bits already"
        yield SettingError("quantization", config.quantization or "(none)", allowed)


def _wrong_with_method(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting of base weights and of the head that the adapter method excludes."""
    method = ADAPTER_METHODS[config.lora.method]
    leaves_weights_alone = method.factors and not method.residual
    if config.bits and not leaves_weights_alone:
        allowed = f"none with adapters of the kind {config.lora.method}, which read the weights or change them"
        yield SettingError("quantization", config.quantization, allowed)
    # PEFT allows one method for an adapter, so the head's LoRA needs a run of LoRA.
    if config.lm_head == "lora" and (method.kind != "LORA" or method.residual):
        allowed = f"frozen | full with adapters of the kind {config.lora.method}"
        yield SettingError("lm_head", config.lm_head, allowed)


def _wrong_targets(config: Config, facts: Facts) -> Iterator[SettingError]:
    """Yields an error for the first target that the model does not have."""
    on_norms = ADAPTER_METHODS[config.lora.method].norms
    family = facts.family
    modules = family.norms if on_norms else (*family.targets, *family.further)
    possible = (*modules, *family.parameters)
    unknown = [name for name in config.lora.targets if name not in possible]
    if unknown:
        yield SettingError("lora.targets", unknown[0], ",".join(possible))


def check_classifier(config: Config) -> None:
    """Checks that a run with a classifier has no setting of a language model head.

    Raises:
        InputError: The run asks for prompts or for a trained language model head. All errors are reported together.
    """
    check_all(_wrong_with_classes(config))


def _wrong_with_classes(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting of a language model that has no meaning with classes."""
    reason = "where texts are sorted into classes, by a head of their own"
    if config.prompt.kind != "off":
        yield SettingError("prompt.kind", config.prompt.kind, f"off {reason}")
    if config.lm_head != "frozen":
        yield SettingError("lm_head", config.lm_head, f"frozen {reason}")


def check_experts(config: Config, facts: Facts) -> None:
    """Checks the settings that concern a mixture of experts.

    Args:
        config: Settings of the run.
        facts: Facts about the model.

    Raises:
        InputError: The model has no experts to balance, or adapters cannot be put on its experts as asked. All errors
            are reported together.
    """
    rules = [_wrong_balance(config, facts)]
    if facts.family.asked(config.lora.targets):
        rules.append(_wrong_expert_adapters(config, facts))
    check_all(*rules)


def _wrong_balance(config: Config, facts: Facts) -> Iterator[SettingError]:
    """Yields an error for a loss that balances experts, if the model has none or float16 may not hold the gradient."""
    if facts.loses_balance and config.router_aux_loss:
        allowed = "0 for this type, whose loss of routers cannot be computed in parts"
        yield SettingError("router_aux_loss", config.router_aux_loss, allowed)
    elif config.router_aux_loss > 0 and not (facts.routed and facts.family.router):
        allowed = "0 for a model without a block that has experts"
        yield SettingError("router_aux_loss", config.router_aux_loss, allowed)
    elif config.dtype == "fp16" and facts.coefficient(config.router_aux_loss):
        allowed = "fp32 | bf16 with a loss that balances experts, whose gradient float16 may not hold"
        yield SettingError("dtype", config.dtype, allowed)


def _wrong_expert_adapters(config: Config, facts: Facts) -> Iterator[SettingError]:
    """Yields an error for each setting that excludes adapters on experts.

    Args:
        config: Settings of a run with adapters on experts.
        facts: Facts about the model.
    """
    asked = facts.family.asked(config.lora.targets)
    if facts.experts < 2:
        yield SettingError("lora.targets", asked[0], f"{','.join(facts.family.targets)} for a model without experts")
        return  # the rules below are about experts
    if config.lora.dropout:
        allowed = f"0 with adapters on {','.join(asked)}, which PEFT adds to the weights themselves"
        yield SettingError("lora.dropout", config.lora.dropout, allowed)
    stacked = [name for name in asked if name in STACKED]
    if stacked and ADAPTER_METHODS[config.lora.method].residual:
        allowed = f"targets that are one matrix each with the method {config.lora.method}, which decomposes them"
        yield SettingError("lora.targets", ",".join(stacked), allowed)

    # With adapters on experts alone, a part without experts would have no adapter.
    only_experts = len(asked) == len(config.lora.targets)
    without = _parts_without_experts(config, facts)
    if only_experts and without:
        allowed = f"other targets, too, under the cut {config.cut}, which leaves the {without[0]} no block with experts"
        yield SettingError("lora.targets", ",".join(asked), allowed)


def _parts_without_experts(config: Config, facts: Facts) -> list[str]:
    """Returns the parts that have blocks, but no block with experts."""
    low, high = config.bounds
    blocks_of = {
        "bottom": range(low),
        "trunk": range(low, high),
        "top": range(high, facts.blocks),
    }
    parts = []
    for part, blocks in blocks_of.items():
        has_experts = any(block in facts.routed for block in blocks)
        if blocks and not has_experts:
            parts.append(part)
    return parts


def check_stacked(strategy: object, config: Config, facts: Facts) -> None:
    """Checks that a strategy can aggregate adapters on the experts' stacked weights, if the run has such adapters.

    Args:
        strategy: The strategy.
        config: Settings of the run.
        facts: Facts about the model.

    Raises:
        SettingError: The strategy multiplies factors, or adapters would have different ranks.
    """
    asked = [name for name in facts.family.asked(config.lora.targets) if name in STACKED]
    if not asked:
        return
    # A stacked weight has a pair of factors for every expert, so B A is no single product.
    if traits_of(strategy).multiplies:
        allowed = f"targets that are one matrix each under the strategy {config.strategy}, which computes with B A"
        raise SettingError("lora.targets", ",".join(asked), allowed)
    if len(set(config.lora.rank)) > 1:
        ranks = ",".join(map(str, config.lora.rank))
        raise SettingError("lora.rank", ranks, f"one rank with adapters on {','.join(asked)}, which are stacked")
