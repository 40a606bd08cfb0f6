"""Checks that settings fit together and suit the model, before any weight is loaded.

Checks that concern one module only are `check_` functions in that module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedsplit.adaptation.methods import ADAPTER_METHODS, check_method
from fedsplit.adaptation.rank_budget import check_budget
from fedsplit.errors import SettingError, check_all
from fedsplit.federation.strategy import traits_of
from fedsplit.model.families import STACKED, Facts
from fedsplit.model.sources import config_folder
from fedsplit.model.token_ids import check_largest
from fedsplit.model.vocabulary import load_tokenizer
from fedsplit.settings.choices import PARTS
from fedsplit.settings.config import Config
from fedsplit.settings.documents import set_by_user
from fedsplit.settings.sections import TrainSettings
from fedsplit.trunk.schedules import SCHEDULES

if TYPE_CHECKING:
    from fedsplit.corpora.sharding import Partition


def learning_parts(config: Config, blocks: int) -> list[str]:
    """Returns the parts that have trainable parameters, and that get gradients under the schedule.

    Args:
        config: Settings of the run.
        blocks: Number of blocks of the model.

    Example:
        >>> learning_parts(Config(cut="0:5"), blocks=6)
        ['trunk', 'top']
    """
    schedule = SCHEDULES[config.trunk.schedule]
    low, high = config.bounds
    if config.prompt.virtual:  # virtual tokens are all that trains
        return ["bottom"] if schedule.returns_gradient else []
    learns = {
        "bottom": schedule.returns_gradient and low > 0,
        "trunk": schedule.learns,
        "top": high < blocks or config.lm_head != "frozen",
    }
    return [part for part, does in learns.items() if does]


def check_cut(config: Config, facts: Facts) -> None:
    """Checks that the model has the blocks of the cut, and that some part learns.

    Raises:
        SettingError: The cut lies outside the model, or no part learns.
    """
    if config.bounds[1] > facts.blocks:
        raise SettingError("cut", config.cut, f"LO:HI with 0 <= LO < HI <= {facts.blocks}, the model's blocks")
    if learning_parts(config, facts.blocks):
        return
    if config.prompt.virtual:
        allowed = f"a schedule that returns gradients, with --prompt.kind {config.prompt.kind}: nothing else learns"
        raise SettingError("trunk.schedule", config.trunk.schedule, allowed)
    allowed = f"a cut that leaves blocks to a part that learns under the trunk schedule {config.trunk.schedule}"
    raise SettingError("cut", config.cut, allowed)


def check_training(config: Config) -> None:
    """Checks that no setting of local training is given where it would have no effect.

    Raises:
        InputError: A setting would have no effect. All errors are reported together.
    """
    check_all(_wrong_training(config))


def _wrong_training(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting of local training that would have no effect."""
    train = config.train
    if config.trunk.schedule == "batched":
        reason = "under the trunk schedule batched, where the trunk's gradient is of no single client's step"
        if train.accumulation > 1:
            yield SettingError("train.accumulation", train.accumulation, f"1 {reason}")
        if train.clip:
            yield SettingError("train.clip", train.clip, f"0 {reason}")

    total_steps = config.rounds * train.steps
    if train.warmup >= 1 and not train.epochs and train.warmup > total_steps:
        yield SettingError("train.warmup", f"{train.warmup:g}", f"up to {total_steps}, a client's steps in all rounds")
    yield from _wrong_optimizer(train)
    if config.min_delta and not (config.patience or config.resume):
        yield SettingError("min_delta", config.min_delta, "0 without --patience")


def _wrong_optimizer(train: TrainSettings) -> Iterator[SettingError]:
    """Yields an error for each setting that the run's optimiser lacks, and that has not its default."""
    if train.momentum and train.optimizer != "sgd":
        yield SettingError("train.momentum", train.momentum, f"0 under {train.optimizer}; it is sgd's")
    if train.optimizer != "sgd":
        return
    for name in ("beta1", "beta2", "eps"):
        value = getattr(train, name)
        default = getattr(TrainSettings(), name)
        if value != default:
            yield SettingError(f"train.{name}", value, f"{default:g}, the default, under sgd, which has none")
    if train.optimizer_state == "keep" and not train.momentum:
        allowed = "reset under sgd without momentum, which remembers nothing"
        yield SettingError("train.optimizer_state", "keep", allowed)


def check_trunk(config: Config) -> None:
    """Checks that settings of the trunk and of the wire have a meaning under the trunk's schedule.

    Raises:
        InputError: A setting has no meaning under the schedule, or excludes a further setting. All errors are reported
            together.
    """
    check_all(_wrong_trunk(config))


def _wrong_trunk(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting of the trunk and of the wire that does not fit the others."""
    schedule = SCHEDULES[config.trunk.schedule]
    trunk = config.trunk
    train = config.train
    if schedule.gathers and train.micro_batches > 1:
        allowed = f"1 under the trunk schedule {trunk.schedule}, which computes the steps of all clients as one"
        yield SettingError("train.micro_batches", train.micro_batches, allowed)
    if trunk.every and not schedule.sums:
        allowed = f"0 under the trunk schedule {trunk.schedule}, which sums nothing over a barrier"
        yield SettingError("trunk.every", trunk.every, allowed)
    if config.dtype == "fp16" and config.wire.codec == "bf16":
        allowed = "raw with --dtype fp16: what crosses has 16 bits already, and would lose three of them"
        yield SettingError("wire.codec", config.wire.codec, allowed)
    if train.micro_batches > train.batch_size:
        allowed = f"0 to {train.batch_size}, the sequences of a batch"
        yield SettingError("train.micro_batches", train.micro_batches, allowed)
    if trunk.group > 1 and not config.deterministic:
        yield SettingError("trunk.group", trunk.group, "1 without --deterministic, under which groups take turns")
    if config.deterministic and trunk.memory and trunk.group > 1:
        allowed = "none with --deterministic and groups: who finds no room would decide the result"
        yield SettingError("trunk.memory", trunk.memory, allowed)
    if trunk.lanes > 1 and (config.deterministic or trunk.memory):
        allowed = "0 or 1 with --deterministic and with --trunk.memory, under which one thing is computed at a time"
        yield SettingError("trunk.lanes", trunk.lanes, allowed)
    if "trunk" not in config.share and not schedule.personal:
        allowed = "trunk among them, unless each client has one of its own (--trunk.schedule copies)"
        yield SettingError("share", ",".join(config.share), allowed)


PROMPT_SETTINGS = {
    "off": (),
    "prompt": ("tokens", "init", "text"),
    "ptuning": ("tokens", "encoder", "hidden", "layers", "dropout"),
    "prefix": ("tokens", "init", "hidden", "projection"),
}
"""Settings of virtual tokens and prefixes that have a meaning, by `prompt.kind`."""

PROMPT_STARTS = {"prompt": ("random", "vocab", "text"), "prefix": ("random", "zero")}
"""Possible values of `prompt.init`, by `prompt.kind`. For `ptuning` only "random" is possible."""


def check_prompt(config: Config) -> None:
    """Checks that settings of prompts, LoRA and the head fit together. PEFT allows one method for an adapter.

    Raises:
        InputError: A setting has no meaning, or excludes a further setting. All errors are reported together.
    """
    check_all(_wrong_prompt(config))


def _wrong_prompt(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting of prompts, LoRA and the head that does not fit the others."""
    prompt = config.prompt
    kind = prompt.kind
    for name, value in set_by_user(prompt).items():
        if name != "kind" and name not in PROMPT_SETTINGS[kind]:
            uses = " | ".join(other for other, names in PROMPT_SETTINGS.items() if name in names)
            yield SettingError(f"prompt.{name}", value, f"its default, except with --prompt.kind {uses}")
    if kind == "off":
        return
    for name, value in set_by_user(config.lora).items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        yield SettingError(f"lora.{name}", shown, f"its default: with --prompt.kind {kind} there are no LoRA adapters")
    if config.keep_best and {*config.share} != {*PARTS}:
        both = f"--prompt.kind {kind} and --keep-best"
        allowed = f"all parts with {both}, for which no client keeps its own of every round"
        yield SettingError("share", ",".join(config.share), allowed)
    if config.lm_head != "frozen":
        yield SettingError("lm_head", config.lm_head, f"frozen with --prompt.kind {kind}")
    starts = PROMPT_STARTS.get(kind, ("random",))
    if prompt.init not in starts:
        yield SettingError("prompt.init", prompt.init, f"{' | '.join(starts)} with --prompt.kind {kind}")
    if (prompt.init == "text") != bool(prompt.text.strip()):
        allowed = "a text that is not empty with --prompt.init text, and none otherwise"
        yield SettingError("prompt.text", prompt.text or "nothing", allowed)
    only_lstm = sorted({"layers", "dropout"} & set_by_user(prompt).keys())
    if only_lstm and prompt.encoder == "mlp":
        name = only_lstm[0]
        yield SettingError(f"prompt.{name}", getattr(prompt, name), "its default, except with --prompt.encoder lstm")
    if prompt.dropout and prompt.layers == 1:
        yield SettingError("prompt.dropout", prompt.dropout, "0 with one layer: it works between layers")
    if kind == "prefix" and prompt.hidden and not prompt.projection:
        yield SettingError("prompt.hidden", prompt.hidden, "0, except with --prompt.projection")


def check_lengths(config: Config, facts: Facts) -> None:
    """Checks that the model has a position for every token of a sequence.

    Raises:
        SettingError: Sequences are longer than the model allows.
    """
    length = config.train.max_length
    positions = config.prompt.positions
    if length > facts.positions:
        raise SettingError("train.max_length", length, f"8 to {facts.positions}, the model's positions")
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
        largest += [int(shard.train.ids.max()), int(shard.held_out.ids.max())]
    if config.prompt.text:
        largest += load_tokenizer(folder)(config.prompt.text)["input_ids"]
    check_largest(folder, config.model, max(largest))


def check_adapters(config: Config, facts: Facts) -> None:
    """Checks that the adapter method works with the targets, the head and the quantisation of the run.

    Raises:
        SettingError: The method does not work with the targets, the head or the quantisation.
    """
    check_method(config, facts.family.transposed)
    check_budget(config)
    method = ADAPTER_METHODS[config.lora.method]
    if config.bits and not (method.factors and not method.residual):
        allowed = f"none with adapters of the kind {config.lora.method}, which read the weights or change them"
        raise SettingError("quantization", config.quantization, allowed)
    if config.lm_head == "lora" and (method.kind != "LORA" or method.residual):
        allowed = f"frozen | full with adapters of the kind {config.lora.method}"
        raise SettingError("lm_head", config.lm_head, allowed)
    targets = facts.family.norms if method.norms else facts.family.targets
    possible = (*targets, *facts.family.parameters)
    for name in config.lora.targets:
        if name not in possible:
            raise SettingError("lora.targets", name, ",".join(possible))


def check_classifier(config: Config) -> None:
    """Checks that a run that classifies sequences asks for no setting of a language model head.

    Raises:
        SettingError: The run asks for prompts or for a trained language model head.
    """
    reason = "where texts are sorted into classes, by a head of their own"
    if config.prompt.kind != "off":
        raise SettingError("prompt.kind", config.prompt.kind, f"off {reason}")
    if config.lm_head != "frozen":
        raise SettingError("lm_head", config.lm_head, f"frozen {reason}")


def check_experts(config: Config, facts: Facts) -> None:
    """Checks the settings that concern a mixture of experts.

    Args:
        config: Settings of the run.
        facts: Facts about the model.

    Raises:
        SettingError: The model has no experts to balance, or adapters cannot be put on its experts as asked.
    """
    if config.router_aux_loss > 0 and not facts.routed:
        allowed = "0 for a model without a block that has experts"
        raise SettingError("router_aux_loss", config.router_aux_loss, allowed)
    if config.dtype == "fp16" and facts.coefficient(config.router_aux_loss):
        allowed = "fp32 | bf16 with a loss that balances experts, whose gradient float16 may not hold"
        raise SettingError("dtype", config.dtype, allowed)
    asked = facts.family.asked(config.lora.targets)
    if not asked:
        return
    if facts.experts < 2:
        raise SettingError("lora.targets", asked[0], f"{','.join(facts.family.targets)} for a model without experts")
    if config.lora.dropout:
        allowed = f"0 with adapters on {','.join(asked)}, which PEFT adds to the weights themselves"
        raise SettingError("lora.dropout", config.lora.dropout, allowed)
    stacked = [name for name in asked if name in STACKED]
    if stacked and ADAPTER_METHODS[config.lora.method].residual:
        allowed = f"targets that are one matrix each with the method {config.lora.method}, which decomposes them"
        raise SettingError("lora.targets", ",".join(stacked), allowed)

    # With adapters on experts alone, a part without experts would have no adapter.
    low, high = config.bounds
    blocks_of = {"bottom": range(low), "trunk": range(low, high), "top": range(high, facts.blocks)}
    without = [part for part, blocks in blocks_of.items() if blocks and not {*blocks} & {*facts.routed}]
    if without and len(asked) == len(config.lora.targets):
        allowed = f"other targets, too, under the cut {config.cut}, which leaves the {without[0]} no block with experts"
        raise SettingError("lora.targets", ",".join(asked), allowed)


def check_stacked(strategy: object, config: Config, facts: Facts) -> None:
    """Checks that a strategy can aggregate adapters on the experts' stacked weights, if the run asks for them.

    Args:
        strategy: The strategy.
        config: Settings of the run.
        facts: Facts about the model.

    Raises:
        SettingError: The strategy multiplies factors, or adapters would have different ranks.
    """
    asked = [name for name in facts.family.asked(config.lora.targets) if name in STACKED]
    if asked and traits_of(strategy).multiplies:
        allowed = f"targets that are one matrix each under the strategy {config.strategy}, which computes with B A"
        raise SettingError("lora.targets", ",".join(asked), allowed)
    if asked and len(set(config.lora.rank)) > 1:
        ranks = ",".join(map(str, config.lora.rank))
        raise SettingError("lora.rank", ranks, f"one rank with adapters on {','.join(asked)}, which are stacked")
