"""Settings that must fit each other and the model; what does not is refused with one line, before anything is loaded.

What a module knows alone it checks itself: see `check_` functions elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedsplit.adaptation.methods import METHODS, check_method
from fedsplit.adaptation.rank_budget import check_budget
from fedsplit.allowed import PARTS, SettingError
from fedsplit.config import Config, TrainSettings
from fedsplit.documents import set_by_user
from fedsplit.federation.strategy import traits_of
from fedsplit.model.families import STACKED, Facts
from fedsplit.model.sources import about
from fedsplit.model.token_ids import check_largest
from fedsplit.model.vocabulary import load_tokenizer
from fedsplit.trunk.schedules import SCHEDULES

if TYPE_CHECKING:
    from fedsplit.corpora.partition import Partition


def learning_parts(config: Config, blocks: int) -> list[str]:
    """The parts that have something to train, and get gradients under the schedule."""
    schedule, (low, high) = SCHEDULES[config.trunk.schedule], config.bounds
    learns = {"bottom": schedule.returns_gradient and low > 0, "trunk": schedule.learns, "top": high < blocks}
    learns["top"] |= config.lm_head != "frozen"
    if config.prompt.virtual:
        learns = {"bottom": schedule.returns_gradient}
    return [part for part, does in learns.items() if does]


def check_cut(config: Config, facts: Facts) -> None:
    """Makes sure that the model can be cut so, and that something learns then.

    Raises:
        SettingError: It cannot, or nothing does.
    """
    if config.bounds[1] > facts.blocks:
        raise SettingError("cut", config.cut, f"LO:HI with 0 <= LO < HI <= {facts.blocks}, the model's blocks")
    if learning_parts(config, facts.blocks):
        return
    if config.prompt.virtual:
        words = f"a schedule that returns gradients, with --prompt.kind {config.prompt.kind}: nothing else learns"
        raise SettingError("trunk.schedule", config.trunk.schedule, words)
    words = f"a cut that leaves blocks to a part that learns under the trunk schedule {config.trunk.schedule}"
    raise SettingError("cut", config.cut, words)


def check_training(config: Config) -> None:
    """Makes sure that no setting of training is asked for where it would do nothing, or has no meaning.

    Raises:
        SettingError: One is.
    """
    train, plain = config.train, TrainSettings()
    if config.trunk.schedule == "batched":
        one = "under the trunk schedule batched, where the trunk's gradient is of no single client's step"
        if train.accumulation > 1:
            raise SettingError("train.accumulation", train.accumulation, f"1 {one}")
        if train.clip:
            raise SettingError("train.clip", train.clip, f"0 {one}")
    if train.warmup >= 1 and not train.epochs and train.warmup > (total := config.rounds * train.steps):
        raise SettingError("train.warmup", f"{train.warmup:g}", f"up to {total}, a client's steps in all rounds")
    if train.momentum and train.optimizer != "sgd":
        raise SettingError("train.momentum", train.momentum, f"0 under {train.optimizer}; it is sgd's")
    for name in ("beta1", "beta2", "eps") if train.optimizer == "sgd" else ():
        if (value := getattr(train, name)) != getattr(plain, name):
            raise SettingError(
                f"train.{name}", value, f"{getattr(plain, name):g}, the default, under sgd, which has none"
            )
    if train.optimizer_state == "keep" and train.optimizer == "sgd" and not train.momentum:
        words = "reset under sgd without momentum, which remembers nothing"
        raise SettingError("train.optimizer_state", "keep", words)
    if config.min_delta and not (config.patience or config.resume):
        raise SettingError("min_delta", config.min_delta, "0 without --patience")


def check_trunk(config: Config) -> None:
    """Makes sure that settings of the trunk, and of what crosses, have a meaning under its schedule.

    Raises:
        SettingError: One has none.
    """
    schedule, trunk, train = SCHEDULES[config.trunk.schedule], config.trunk, config.train
    if schedule.gathers and train.micro_batches > 1:
        words = f"1 under the trunk schedule {trunk.schedule}, which computes the steps of all clients as one"
        raise SettingError("train.micro_batches", train.micro_batches, words)
    if trunk.every and not schedule.sums:
        words = f"0 under the trunk schedule {trunk.schedule}, which sums nothing over a barrier"
        raise SettingError("trunk.every", trunk.every, words)
    if config.dtype == "fp16" and config.wire.codec == "bf16":
        words = "raw with --dtype fp16: what crosses has 16 bits already, and would lose three of them"
        raise SettingError("wire.codec", config.wire.codec, words)
    if train.micro_batches > train.batch_size:
        words = f"0 to {train.batch_size}, the sequences of a batch"
        raise SettingError("train.micro_batches", train.micro_batches, words)
    if trunk.group > 1 and not config.deterministic:
        raise SettingError("trunk.group", trunk.group, "1 without --deterministic, under which groups take turns")
    if config.deterministic and trunk.memory and trunk.group > 1:
        words = "none with --deterministic and groups: who finds no room would decide the result"
        raise SettingError("trunk.memory", trunk.memory, words)
    if trunk.lanes > 1 and (config.deterministic or trunk.memory):
        words = "0 or 1 with --deterministic and with --trunk.memory, under which one thing is computed at a time"
        raise SettingError("trunk.lanes", trunk.lanes, words)
    if "trunk" not in config.share and not schedule.personal:
        words = "trunk among them, unless each client has one of its own (--trunk.schedule copies)"
        raise SettingError("share", ",".join(config.share), words)


PROMPT_SETTINGS = {
    "off": (),
    "prompt": ("tokens", "init", "text"),
    "ptuning": ("tokens", "encoder", "hidden", "layers", "dropout"),
    "prefix": ("tokens", "init", "hidden", "projection"),
}
"""Which settings of prompts a kind has a use for."""

PROMPT_STARTS = {"prompt": ("random", "vocab", "text"), "prefix": ("random", "zero")}
"""What virtual tokens and prefixes can start from; p-tuning's at random."""


def check_prompt(config: Config) -> None:
    """Makes sure that settings of prompts, LoRA and the head belong together: PEFT has one method an adapter.

    Raises:
        SettingError: One has no use, or is not possible beside another.
    """
    prompt, kind = config.prompt, config.prompt.kind
    for name, value in set_by_user(prompt).items():
        if name != "kind" and name not in PROMPT_SETTINGS[kind]:
            uses = " | ".join(other for other, names in PROMPT_SETTINGS.items() if name in names)
            raise SettingError(f"prompt.{name}", value, f"its default, except with --prompt.kind {uses}")
    if kind == "off":
        return
    for name, value in set_by_user(config.lora).items():
        given = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise SettingError(f"lora.{name}", given, f"its default: with --prompt.kind {kind} there are no LoRA adapters")
    if config.keep_best and {*config.share} != {*PARTS}:
        words = f"all parts with --prompt.kind {kind} and --keep-best, for which no client keeps its own of every round"
        raise SettingError("share", ",".join(config.share), words)
    if config.lm_head != "frozen":
        raise SettingError("lm_head", config.lm_head, f"frozen with --prompt.kind {kind}")
    if prompt.init not in (starts := PROMPT_STARTS.get(kind, ("random",))):
        raise SettingError("prompt.init", prompt.init, f"{' | '.join(starts)} with --prompt.kind {kind}")
    if (prompt.init == "text") != bool(prompt.text.strip()):
        words = "a text that is not empty with --prompt.init text, and none otherwise"
        raise SettingError("prompt.text", prompt.text or "nothing", words)
    for name in sorted({"layers", "dropout"} & set_by_user(prompt).keys()) if prompt.encoder == "mlp" else ():
        raise SettingError(f"prompt.{name}", getattr(prompt, name), "its default, except with --prompt.encoder lstm")
    if prompt.dropout and prompt.layers == 1:
        raise SettingError("prompt.dropout", prompt.dropout, "0 with one layer: it works between layers")
    if kind == "prefix" and prompt.hidden and not prompt.projection:
        raise SettingError("prompt.hidden", prompt.hidden, "0, except with --prompt.projection")


def check_lengths(config: Config, facts: Facts) -> None:
    """Makes sure that the model has a position for every token.

    Raises:
        SettingError: It has not.
    """
    length, positions = config.train.max_length, config.prompt.positions
    if length > facts.positions:
        raise SettingError("train.max_length", length, f"8 to {facts.positions}, the model's positions")
    if positions and length + positions > facts.positions:
        words = f"at most the model's {facts.positions} positions together with train.max_length {length}"
        raise SettingError("prompt.tokens", positions, words)


def check_tokens(config: Config, deal: Partition) -> None:
    """Makes sure that the model's embedding has a row for every token of the clients' texts, and of the prompt's.

    Args:
        config: The run's.
        deal: The data, dealt out.

    Raises:
        SettingError: It has not.
    """
    folder = about(config)
    found = [int(rows.ids.max()) for shard in deal.shards for rows in (shard.train, shard.held_out)]
    if config.prompt.text:
        found += load_tokenizer(folder)(config.prompt.text)["input_ids"]
    check_largest(folder, config.model, max(found))


def check_adapters(config: Config, facts: Facts) -> None:
    """Makes sure that adapters of the kind asked for can sit where they are asked for, on weights as they are held.

    Raises:
        SettingError: They cannot.
    """
    check_method(config, facts.family.transposed)
    check_budget(config)
    method = METHODS[config.lora.method]
    if config.bits and not (method.factors and not method.residual):
        words = f"none with adapters of the kind {config.lora.method}, which read the weights or change them"
        raise SettingError("quantization", config.quantization, words)
    if config.lm_head == "lora" and (method.kind != "LORA" or method.residual):
        words = f"frozen | full with adapters of the kind {config.lora.method}"
        raise SettingError("lm_head", config.lm_head, words)
    targets = facts.family.norms if method.norms else facts.family.targets
    possible = (*targets, *facts.family.parameters)
    if strange := [name for name in config.lora.targets if name not in possible]:
        raise SettingError("lora.targets", strange[0], ",".join(possible))


def check_classifier(config: Config) -> None:
    """Makes sure that nothing is asked of a head for tokens where the head is one for classes.

    Raises:
        SettingError: It is.
    """
    words = "where texts are sorted into classes, by a head of their own"
    if config.prompt.kind != "off":
        raise SettingError("prompt.kind", config.prompt.kind, f"off {words}")
    if config.lm_head != "frozen":
        raise SettingError("lm_head", config.lm_head, f"frozen {words}")


def check_experts(config: Config, facts: Facts) -> None:
    """Makes sure that what is asked of a mixture of experts can be had of this model.

    Args:
        config: The run's.
        facts: The model's `Facts`.

    Raises:
        SettingError: There are no experts to balance, or adapters cannot sit where they are asked for.
    """
    if config.router_aux_loss > 0 and not facts.routed:
        words = "0 for a model without a block that has experts"
        raise SettingError("router_aux_loss", config.router_aux_loss, words)
    if config.dtype == "fp16" and facts.coefficient(config.router_aux_loss):
        words = "fp32 | bf16 with a loss that balances experts, whose gradient float16 may not hold"
        raise SettingError("dtype", config.dtype, words)
    asked = facts.family.asked(config.lora.targets)
    if not asked:
        return
    if facts.experts < 2:
        raise SettingError("lora.targets", asked[0], f"{','.join(facts.family.targets)} for a model without experts")
    if config.lora.dropout:
        words = f"0 with adapters on {','.join(asked)}, which PEFT adds to the weights themselves"
        raise SettingError("lora.dropout", config.lora.dropout, words)
    if METHODS[config.lora.method].residual and (stacked := [name for name in asked if name in STACKED]):
        words = f"targets that are one matrix each with the method {config.lora.method}, which decomposes them"
        raise SettingError("lora.targets", ",".join(stacked), words)
    low, high = config.bounds
    own = {"bottom": range(low), "trunk": range(low, high), "top": range(high, facts.blocks)}
    without = [part for part, blocks in own.items() if blocks and not {*blocks} & {*facts.routed}]
    if without and len(asked) == len(config.lora.targets):
        words = f"other targets, too, under the cut {config.cut}, which leaves the {without[0]} no block with experts"
        raise SettingError("lora.targets", ",".join(asked), words)


def check_stacked(strategy: Any, config: Config, facts: Facts) -> None:
    """Makes sure that a strategy can do with adapters on the experts' stacked weights, where they are asked for.

    Args:
        strategy: The strategy.
        config: The run's.
        facts: The model's `Facts`.

    Raises:
        SettingError: It cannot, or they would differ in rank.
    """
    asked = [name for name in facts.family.asked(config.lora.targets) if name in STACKED]
    if asked and traits_of(strategy).multiplies:
        words = f"targets that are one matrix each under the strategy {config.strategy}, which computes with B A"
        raise SettingError("lora.targets", ",".join(asked), words)
    if asked and len(set(config.lora.rank)) > 1:
        ranks = ",".join(map(str, config.lora.rank))
        raise SettingError("lora.rank", ranks, f"one rank with adapters on {','.join(asked)}, which are stacked")
