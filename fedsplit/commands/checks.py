"""Checks that settings fit together.

Checks that concern one module only are `check_` functions in that module.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedsplit.adaptation.methods import ADAPTER_METHODS
from fedsplit.corpora.loaders import path_of
from fedsplit.errors import SettingError, check_all
from fedsplit.settings.choices import FORMATS, PARTS
from fedsplit.settings.config import Config
from fedsplit.settings.documents import set_by_user
from fedsplit.settings.sections import PromptSettings, TrainSettings
from fedsplit.settings.validators import SPEED
from fedsplit.trunk.schedules import SCHEDULES


def check_training(config: Config) -> None:
    """Checks that every given setting of local training has an effect.

    Raises:
        InputError: A setting would have no effect. All errors are reported together.

    Example:
        >>> check_training(Config(min_delta=0.1))
        Traceback (most recent call last):
        fedsplit.errors.SettingError: min_delta: 0.1 is not possible; allowed: 0 without --patience
    """
    check_all(
        _wrong_batched(config),
        _wrong_warmup(config),
        _wrong_optimizer(config.train),
        _wrong_patience(config),
    )


def _wrong_batched(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting of a client's gradient that has no effect under the schedule `batched`."""
    if config.trunk.schedule != "batched":
        return
    reason = "under the trunk schedule batched, where the trunk's gradient is of no single client's step"
    if config.train.accumulation > 1:
        yield SettingError("train.accumulation", config.train.accumulation, f"1 {reason}")
    if config.train.clip:
        yield SettingError("train.clip", config.train.clip, f"0 {reason}")


def _wrong_warmup(config: Config) -> Iterator[SettingError]:
    """Yields an error if the warmup is longer than a client's training."""
    train = config.train
    # Below 1, the warmup is a share of the steps. With epochs, the number of steps depends on the client's data.
    if train.warmup < 1 or train.epochs:
        return
    total_steps = config.rounds * train.steps
    if train.warmup > total_steps:
        yield SettingError("train.warmup", f"{train.warmup:g}", f"up to {total_steps}, a client's steps in all rounds")


def _wrong_patience(config: Config) -> Iterator[SettingError]:
    """Yields an error for a margin of early stopping without early stopping."""
    # A resumed run may switch early stopping off, while the margin stays in the file of the run.
    if config.min_delta and not (config.patience or config.resume):
        yield SettingError("min_delta", config.min_delta, "0 without --patience")


def _wrong_optimizer(train: TrainSettings) -> Iterator[SettingError]:
    """Yields an error for each setting that differs from its default and that the run's optimiser does not have."""
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

    Example:
        >>> from fedsplit.settings.sections import TrunkSettings
        >>> check_trunk(Config(clients=2, trunk=TrunkSettings(replicas=3)))
        Traceback (most recent call last):
        fedsplit.errors.SettingError: trunk.replicas: 3 is not possible; allowed: 1 to 2, the number of clients
    """
    check_all(
        _wrong_under_schedule(config),
        _wrong_codec(config),
        _wrong_micro_batches(config.train),
        _wrong_parallelism(config),
        _wrong_trunks(config),
        _wrong_averaging(config),
        _wrong_share(config),
    )


def _wrong_under_schedule(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting of steps that has no meaning under the trunk's schedule."""
    name = config.trunk.schedule
    schedule = SCHEDULES[name]
    if schedule.gathers and config.train.micro_batches > 1:
        allowed = f"1 under the trunk schedule {name}, which computes the steps of all clients as one"
        yield SettingError("train.micro_batches", config.train.micro_batches, allowed)
    if config.trunk.every and not schedule.sums:
        allowed = f"0 under the trunk schedule {name}, which sums nothing over a barrier"
        yield SettingError("trunk.every", config.trunk.every, allowed)


def _wrong_codec(config: Config) -> Iterator[SettingError]:
    """Yields an error for a codec that would only lose precision."""
    # Several roles may have one codec, which is one error.
    for text in {*config.wire.codecs.values()}:
        if config.dtype == "fp16" and text.split(",")[0] == "bf16":
            allowed = "raw with --dtype fp16: what crosses has 16 bits already, and would lose three of them"
            yield SettingError("wire.codec", text, allowed)


def _wrong_micro_batches(train: TrainSettings) -> Iterator[SettingError]:
    """Yields an error for more micro-batches than a batch has sequences."""
    if train.micro_batches > train.batch_size:
        allowed = f"0 to {train.batch_size}, the sequences of a batch"
        yield SettingError("train.micro_batches", train.micro_batches, allowed)


def _wrong_parallelism(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting of the trunk's parallel work that a further setting excludes."""
    trunk = config.trunk
    # Clients form groups under --deterministic alone. Otherwise each client trains as soon as possible.
    if trunk.group > 1 and not config.deterministic:
        yield SettingError("trunk.group", trunk.group, "1 without --deterministic, under which groups take turns")
    if config.deterministic and trunk.memory and trunk.group > 1:
        allowed = "none with --deterministic and groups: who finds no room would decide the result"
        yield SettingError("trunk.memory", trunk.memory, allowed)
    if trunk.lanes > 1 and (config.deterministic or trunk.memory):
        allowed = "0 or 1 with --deterministic and with --trunk.memory, under which one thing is computed at a time"
        yield SettingError("trunk.lanes", trunk.lanes, allowed)


def _wrong_share(config: Config) -> Iterator[SettingError]:
    """Yields an error if the trunk's adapter is not aggregated although all clients train one."""
    if "trunk" not in config.share and not SCHEDULES[config.trunk.schedule].personal:
        allowed = "trunk among them, unless each client has one of its own (--trunk.schedule copies)"
        yield SettingError("share", ",".join(config.share), allowed)


def _wrong_trunks(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting of stages or replicas of the trunk that does not fit a further setting."""
    schedule = SCHEDULES[config.trunk.schedule]
    trunk = config.trunk
    stages = trunk.stage_bounds
    low, high = config.bounds
    if stages and (stages[0], stages[-1]) != (low, high):
        yield SettingError("trunk.stages", trunk.stages, f"{low}:…:{high}, from end to end of the cut {config.cut}")

    # A replica without a client would have nothing to train on.
    if trunk.replicas > config.clients:
        yield SettingError("trunk.replicas", trunk.replicas, f"1 to {config.clients}, the number of clients")

    sums_gradients = schedule.gathers or schedule.sums
    if trunk.sync == "step" and not sums_gradients:
        allowed = f"round under the trunk schedule {trunk.schedule}; batched and accumulate sum the clients' gradients"
        yield SettingError("trunk.sync", trunk.sync, allowed)
    if trunk.sync == "step" and trunk.replicas == 1:
        yield SettingError("trunk.sync", trunk.sync, "round, except with several --trunk.replicas")

    has_numbers = trunk.weights not in ("", SPEED)
    if has_numbers and len(trunk.replica_weights) != trunk.replicas:
        yield SettingError("trunk.weights", trunk.weights, f"{trunk.replicas} numbers, one for each replica")
    if trunk.weights == SPEED and config.deterministic:
        allowed = "numbers with --deterministic: a measured speed would decide the result"
        yield SettingError("trunk.weights", trunk.weights, allowed)


def _wrong_averaging(config: Config) -> Iterator[SettingError]:
    """Yields an error if the trunk's adapter cannot be divided into stages, or replicas cannot be averaged."""
    trunk = config.trunk
    schedule = SCHEDULES[trunk.schedule]
    method = ADAPTER_METHODS.get(config.lora.method)  # a wrong name is an error of its own
    allocates = method is not None and method.allocates
    if allocates and trunk.stages:
        allowed = f"none with {config.lora.method}, which allocates the ranks of all blocks together"
        yield SettingError("trunk.stages", trunk.stages, allowed)
    # Personal adapters are never averaged over replicas: each belongs to one client, and so to one replica.
    if trunk.replicas == 1 or not schedule.learns or schedule.personal:
        return
    if allocates:
        allowed = f"1 with {config.lora.method}, for which each replica would allocate different ranks"
        yield SettingError("trunk.replicas", trunk.replicas, allowed)
    if config.train.optimizer == "adamw8bit":
        yield SettingError("trunk.replicas", trunk.replicas, "1 with adamw8bit, whose moments cannot be averaged")


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
    rules = [_wrong_prompt_fields(config.prompt)]
    # Without prompts, the further rules would refuse the settings of LoRA.
    if config.prompt.kind != "off":
        rules.append(_wrong_beside_prompts(config))
        rules.append(_wrong_init(config.prompt))
        rules.append(_wrong_encoder(config.prompt))
    check_all(*rules)


def _wrong_prompt_fields(prompt: PromptSettings) -> Iterator[SettingError]:
    """Yields an error for each setting of prompts that the kind of prompts does not have."""
    allowed_fields = ("kind", *PROMPT_SETTINGS[prompt.kind])
    for name, value in set_by_user(prompt).items():
        if name in allowed_fields:
            continue
        kinds = [kind for kind, fields in PROMPT_SETTINGS.items() if name in fields]
        allowed = f"its default, except with --prompt.kind {' | '.join(kinds)}"
        yield SettingError(f"prompt.{name}", value, allowed)


def _wrong_beside_prompts(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting outside the section `prompt` that a kind of prompts excludes."""
    kind = config.prompt.kind
    for name, value in set_by_user(config.lora).items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        yield SettingError(f"lora.{name}", shown, f"its default: with --prompt.kind {kind} there are no LoRA adapters")

    # After the last round, a client's personal prompt of the best round would be gone.
    shares_all = {*config.share} == {*PARTS}
    if config.keep_best and not shares_all:
        both = f"--prompt.kind {kind} and --keep-best"
        allowed = f"all parts with {both}, since no client keeps its personal prompts of earlier rounds"
        yield SettingError("share", ",".join(config.share), allowed)
    if config.lm_head != "frozen":
        yield SettingError("lm_head", config.lm_head, f"frozen with --prompt.kind {kind}")


def _wrong_init(prompt: PromptSettings) -> Iterator[SettingError]:
    """Yields an error for each setting of initial virtual tokens that does not fit the kind of prompts or the text."""
    starts = PROMPT_STARTS.get(prompt.kind, ("random",))
    if prompt.init not in starts:
        yield SettingError("prompt.init", prompt.init, f"{' | '.join(starts)} with --prompt.kind {prompt.kind}")
    needs_text = prompt.init == "text"
    has_text = bool(prompt.text.strip())
    if needs_text != has_text:
        allowed = "a text that is not empty with --prompt.init text, and none otherwise"
        yield SettingError("prompt.text", prompt.text or "nothing", allowed)


def _wrong_encoder(prompt: PromptSettings) -> Iterator[SettingError]:
    """Yields an error for each setting of the encoder of virtual tokens that the encoder does not have."""
    only_lstm = sorted({"layers", "dropout"} & set_by_user(prompt).keys())
    if only_lstm and prompt.encoder == "mlp":
        name = only_lstm[0]
        yield SettingError(f"prompt.{name}", getattr(prompt, name), "its default, except with --prompt.encoder lstm")
    if prompt.dropout and prompt.layers == 1:
        yield SettingError("prompt.dropout", prompt.dropout, "0 with one layer: it works between layers")
    if prompt.kind == "prefix" and prompt.hidden and not prompt.projection:
        yield SettingError("prompt.hidden", prompt.hidden, "0, except with --prompt.projection")


def check_mods(config: Config) -> None:
    """Checks that mods find a client of Flower's to work around, and that nothing changes adapters behind the mods.

    Raises:
        InputError: The engine has no such clients, or adapters pass through a codec. All errors are reported together.

    Example:
        >>> check_mods(Config(mods=("fixedclipping_mod",), engine="local"))
        Traceback (most recent call last):
        fedsplit.errors.SettingError: engine: local is not possible; allowed: ray | flower with --mods, which work \
around Flower's clients
    """
    check_all(_wrong_beside_mods(config))


def _wrong_beside_mods(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting that does not fit mods."""
    if not config.mods:
        return
    if config.engine == "local":
        yield SettingError("engine", "local", "ray | flower with --mods, which work around Flower's clients")
    if config.adapter.codec != "raw":
        allowed = "raw with --mods: after a codec, a change may be larger than a mod has left it"
        yield SettingError("adapter.codec", config.adapter.codec, allowed)


def check_places(config: Config) -> None:
    """Checks the settings by which clients are pinned to the nodes of a cluster, or are sites of their own.

    Raises:
        InputError: There is no cluster, a node would not find the data set, or a setting does not fit sites. All errors
            are reported together.
    """
    check_all(_wrong_at_sites(config), _wrong_places(config))


def _wrong_at_sites(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting that does not fit clients at sites of their own."""
    if config.data.at != "site":
        return
    if config.engine != "flower":
        yield SettingError("engine", config.engine, "flower with --data.at site, in a run of flwr run")
    if not config.trunk.server:
        yield SettingError("trunk.server", "nothing", "the address of the trunk with --data.at site")
    if config.data.format in ("auto", "classification"):
        allowed = " | ".join(name for name in FORMATS if name not in ("auto", "classification"))
        words = f"{allowed} with --data.at site, where the server reads no data"
        yield SettingError("data.format", config.data.format, words)


def _wrong_places(config: Config) -> Iterator[SettingError]:
    """Yields an error for each setting that does not fit clients which are pinned to nodes."""
    if config.data.at != "label":
        return
    if config.engine != "ray" or config.ray.address == "local":
        yield SettingError("data.at", "label", "driver | shared without a cluster of several nodes (--ray.address)")
    # A relative path would mean a different folder in the process of each node. Names of data sets are no paths.
    for name, value in (("dataset", config.dataset), ("data.held_out", config.data.held_out)):
        path = path_of(value)
        is_path = bool(value) and path.exists()
        if is_path and not path.is_absolute():
            yield SettingError(name, value, "an absolute path with --data.at label: each node reads the data by itself")
