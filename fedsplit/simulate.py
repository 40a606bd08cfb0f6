"""`python -m fedsplit.simulate`: the whole federation on one machine, with one command."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsplit.command import QUIET, exit_code
from fedsplit.config import PARTS, Config, SettingError, TrainSettings, set_by_user
from fedsplit.flags import parse

ENVIRONMENT = {
    **QUIET,
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Threads that wait sleep. They would burn their core otherwise, which client and trunk need in turn: with another
    # process on the machine, two threads each were six to ten times slower.
    "OMP_WAIT_POLICY": "passive",
    "RAY_worker_niceness": "0",  # Ray's workers would otherwise give way to anything else on the machine
    # Tensors up to this many bytes travel within the call; the detour over the object store takes a
    # quarter of a round's time with the default model.
    "RAY_max_direct_call_object_size": str(8 * 2**20),
    # Despite its name this decides on Linux, too: with 0 all of Ray's servers bind to the loopback interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""The environment of this process and all that it starts: no telemetry, no chatter, no open port."""


def prepare_environment() -> None:
    """Sets what must be set before the libraries are imported, since they read it only then.

    Without a token of its own, anyone on the machine could run code in Ray's processes.
    """
    for name, value in {**ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
        os.environ.setdefault(name, value)


def learning_parts(config: Config, blocks: int) -> list[str]:
    """The parts that have something to train, and get gradients under the schedule."""
    from fedsplit.schedules import SCHEDULES

    schedule, (low, high) = SCHEDULES[config.trunk.schedule], config.bounds
    learns = {"bottom": schedule.returns_gradient and low > 0, "trunk": schedule.learns, "top": high < blocks}
    learns["top"] |= config.lm_head != "frozen"
    if config.prompt.virtual:
        learns = {"bottom": schedule.returns_gradient}
    return [part for part, does in learns.items() if does]


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
        raise SettingError(f"lora.{name}", value, f"its default: with --prompt.kind {kind} there are no LoRA adapters")
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


def check(config: Config) -> tuple[Path, Any, Any]:
    """Everything that can be found wrong before a model is loaded or a file is written; cheapest first.

    Returns:
        The run's folder, not made yet, the strategy, and the data as they are dealt out.

    Raises:
        SettingError: Something was given wrongly.
    """
    from fedsplit.families import read_facts
    from fedsplit.methods import METHODS, check_method
    from fedsplit.schedules import SCHEDULES
    from fedsplit.sources import about, weights
    from fedsplit.tables import check_dataset, check_packing

    check_prompt(config)
    facts = read_facts(about(config))
    if config.bounds[1] > facts.blocks:
        raise SettingError("cut", config.cut, f"LO:HI with 0 <= LO < HI <= {facts.blocks}, the model's blocks")
    if config.prompt.virtual and not learning_parts(config, facts.blocks):
        words = f"a schedule that returns gradients, with --prompt.kind {config.prompt.kind}: nothing else learns"
        raise SettingError("trunk.schedule", config.trunk.schedule, words)
    if not learning_parts(config, facts.blocks):
        words = f"a cut that leaves blocks to a part that learns under the trunk schedule {config.trunk.schedule}"
        raise SettingError("cut", config.cut, words)
    if config.trunk.schedule == "batched" and config.train.micro_batches > 1:
        words = "1 under the trunk schedule batched, which computes the steps of all clients as one"
        raise SettingError("train.micro_batches", config.train.micro_batches, words)
    check_training(config)
    if config.trunk.every and not SCHEDULES[config.trunk.schedule].sums:
        words = f"0 under the trunk schedule {config.trunk.schedule}, which sums nothing over a barrier"
        raise SettingError("trunk.every", config.trunk.every, words)
    if config.dtype == "fp16" and config.wire.codec == "bf16":
        words = "raw with --dtype fp16: what crosses has 16 bits already, and would lose three of them"
        raise SettingError("wire.codec", config.wire.codec, words)
    if config.train.micro_batches > config.train.batch_size:
        words = f"0 to {config.train.batch_size}, the sequences of a batch"
        raise SettingError("train.micro_batches", config.train.micro_batches, words)
    if config.trunk.group > 1 and not config.deterministic:
        raise SettingError(
            "trunk.group", config.trunk.group, "1 without --deterministic, under which groups take turns"
        )
    plan(config)
    if config.deterministic and config.trunk.memory and config.trunk.group > 1:
        words = "none with --deterministic and groups: who finds no room would decide the result"
        raise SettingError("trunk.memory", config.trunk.memory, words)
    if "trunk" not in config.share and not SCHEDULES[config.trunk.schedule].personal:
        words = "trunk among them, unless each client has one of its own (--trunk.schedule copies)"
        raise SettingError("share", ",".join(config.share), words)
    if config.train.max_length > facts.positions:
        raise SettingError(
            "train.max_length", config.train.max_length, f"8 to {facts.positions}, the model's positions"
        )
    if (positions := config.prompt.positions) and config.train.max_length + positions > facts.positions:
        words = (
            f"at most the model's {facts.positions} positions together with train.max_length {config.train.max_length}"
        )
        raise SettingError("prompt.tokens", positions, words)
    check_method(config, facts.family.transposed)
    method = METHODS[config.lora.method]
    if config.bits and not (method.factors and not method.residual):
        words = f"none with adapters of the kind {config.lora.method}, which read the weights or change them"
        raise SettingError("quantization", config.quantization, words)
    if config.dtype == "fp16" and facts.coefficient(config.router_aux_loss):
        words = "fp32 | bf16 with a loss that balances experts, whose gradient float16 may not hold"
        raise SettingError("dtype", config.dtype, words)
    if config.lm_head == "lora" and (method.kind != "LORA" or method.residual):
        words = f"frozen | full with adapters of the kind {config.lora.method}"
        raise SettingError("lm_head", config.lm_head, words)
    targets = facts.family.norms if method.norms else facts.family.targets
    possible = (*targets, *facts.family.parameters)
    if strange := [name for name in config.lora.targets if name not in possible]:
        raise SettingError("lora.targets", strange[0], ",".join(possible))
    check_experts(config, facts)
    check_packing(config.data)
    check_dataset(config.dataset, config.data)

    from fedsplit.devices import check_devices

    check_devices(config)

    from fedsplit.aggregation import strategy_defaults
    from fedsplit.checkpoint import check_folder, check_resumable
    from fedsplit.heldout import deal_of
    from fedsplit.optim import check_optimizer
    from fedsplit.quantization import check_quantization
    from fedsplit.split import check_checkpoint
    from fedsplit.strategy import check_strategy, load_strategy

    folder = Path(config.resume or config.out or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    if config.resume:
        check_resumable(folder, config.rounds, config.patience)
    else:
        check_folder(folder)
    check_optimizer(config.train)
    strategy = load_strategy(config.strategy, config.strategy_options, strategy_defaults(config))
    check_strategy(strategy, config)
    check_stacked(strategy, config, facts)
    check_quantization(config)
    if config.lora.method != "lora" or config.lora.options:
        from fedsplit.injection import check_injection

        check_injection(config, facts.family)
    deal = deal_of(config)
    if deal.classes:
        check_classifier(config)
    check_checkpoint(weights(config, tell=print))  # last: they may have to be fetched first
    return folder, strategy, deal


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


def check_experts(config: Config, facts: Any) -> None:
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
    asked = facts.family.asked(config.lora.targets)
    if not asked:
        return
    if facts.experts < 2:
        raise SettingError("lora.targets", asked[0], f"{','.join(facts.family.targets)} for a model without experts")
    if config.lora.dropout:
        words = f"0 with adapters on {','.join(asked)}, which PEFT adds to the weights themselves"
        raise SettingError("lora.dropout", config.lora.dropout, words)
    low, high = config.bounds
    own = {"bottom": range(low), "trunk": range(low, high), "top": range(high, facts.blocks)}
    without = [part for part, blocks in own.items() if blocks and not {*blocks} & {*facts.routed}]
    if without and len(asked) == len(config.lora.targets):
        words = f"other targets, too, under the cut {config.cut}, which leaves the {without[0]} no block with experts"
        raise SettingError("lora.targets", ",".join(asked), words)


def check_stacked(strategy: Any, config: Config, facts: Any) -> None:
    """Makes sure that a strategy can do with adapters on the experts' stacked weights, where they are asked for.

    Args:
        strategy: The strategy.
        config: The run's.
        facts: The model's `Facts`.

    Raises:
        SettingError: It cannot, or they would differ in rank.
    """
    from fedsplit.families import STACKED
    from fedsplit.strategy import traits_of

    asked = [name for name in facts.family.asked(config.lora.targets) if name in STACKED]
    if asked and traits_of(strategy).multiplies:
        words = f"targets that are one matrix each under the strategy {config.strategy}, which computes with B A"
        raise SettingError("lora.targets", ",".join(asked), words)
    if asked and len(set(config.lora.rank)) > 1:
        ranks = ",".join(map(str, config.lora.rank))
        raise SettingError("lora.rank", ranks, f"one rank with adapters on {','.join(asked)}, which are stacked")


@dataclass(frozen=True)
class Plan:
    """Who gets how much of the machine.

    Attributes:
        workers: Processes that play the clients.
        client_threads: Threads of each of them.
        trunk_threads: Threads of the trunk's process.
        micro_batches: Parts of a batch that each client has under way at once.
    """

    workers: int
    client_threads: int
    trunk_threads: int
    micro_batches: int


def plan(config: Config) -> Plan:
    """Deals the cores out; threads that outnumber the cores make every process several times slower.

    Where there are fewer clients at a time than cores, half of the cores are the trunk's, and two micro-batches
    keep both sides at work. Where the result must not depend on the number of processes, threads and
    micro-batches do not either: they decide how sums are rounded, and which dropout is drawn.

    Raises:
        SettingError: More clients should train at once than there are processes.
    """
    from fedsplit.schedules import SCHEDULES, is_deterministic

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(config.workers or cores, config.clients)
    fixed = config.deterministic or is_deterministic(config.trunk.schedule, config.trunk.every)
    at_once = min(cores, config.clients) if fixed else workers
    trunk = cores // 2 if at_once < cores else 1
    client = max(1, (cores - trunk) // at_once) if at_once < cores else 1
    group = config.trunk.group
    if config.deterministic and group > workers:
        raise SettingError("trunk.group", group, f"1 to {workers}, the number of client processes")
    one = SCHEDULES[config.trunk.schedule].gathers or config.router_aux_loss > 0  # what they would change
    micro_batches = 1 if one or at_once >= cores else 2
    return Plan(
        workers, config.threads or client, config.trunk.threads or trunk, config.train.micro_batches or micro_batches
    )


def check_memory(config: Config, trunk: Any) -> None:
    """Makes sure that the memory given to the trunk suffices; only the trunk, once it is loaded, can tell.

    Raises:
        SettingError: It does not suffice for a single step.
    """
    limit = config.trunk.memory_bytes
    if limit is not None and (least := trunk.status()["least_memory"]) > limit:
        words = f"at least {-(-least // 10**6)}MB, for this trunk and one step at a time"
        raise SettingError("trunk.memory", config.trunk.memory, words)


def run(config: Config) -> dict[str, Any]:
    """Runs a federation.

    Returns:
        The summary, as in summary.json.

    Raises:
        InputError: Something was given wrongly; nothing has been written.
        FederationFailed, RefusedUpdate, TrunkLost: The run broke.
    """
    started = time.perf_counter()
    folder, strategy, deal = check(config)

    from fedsplit.actor import start_cluster, start_trunk, stop_cluster
    from fedsplit.aggregation import FederationFailed
    from fedsplit.census import as_document, stated, table
    from fedsplit.checkpoint import RunFolder
    from fedsplit.families import read_facts
    from fedsplit.report import make_watcher
    from fedsplit.server_app import Federation
    from fedsplit.sources import about, pinned

    facts = read_facts(about(config))
    config = replace(config, router_aux_loss=facts.coefficient(config.router_aux_loss))
    shares = plan(config)
    config = replace(config, model=pinned(config), train=replace(config.train, micro_batches=shares.micro_batches))
    with make_watcher() as watcher:
        watcher.line(
            f"{config.clients} clients in {shares.workers} processes; "
            f"threads: {shares.client_threads} each, trunk {shares.trunk_threads}; "
            f"micro-batches: {shares.micro_batches}"
        )
        trunk_line = f"blocks {config.cut} of {facts.blocks}, {config.trunk.schedule}"
        kind = f"; adapters: {config.lora.method}" if config.lora.method != "lora" else ""
        watcher.line(f"model {config.model}; trunk: {trunk_line}; strategy: {config.strategy}{kind}")
        for line in [*stated(deal), *(table(deal) if config.data.show else [])]:
            watcher.line(line)
        name = f"trunk-{os.getpid()}-{time.time_ns()}"
        try:
            start_cluster(shares.workers)
            trunk = start_trunk(config, name, shares.trunk_threads)
            check_memory(config, trunk)
            results = RunFolder(folder, config, facts.family, facts.blocks)
            results.save_data(as_document(deal))
            federation = Federation(config, trunk, name, shares.client_threads, strategy, results, watcher, started)
            _simulate(federation, config.clients)
        finally:
            stop_cluster()
    if federation.summary is None:  # rich ends the server's thread without an error when nobody reads on
        raise FederationFailed("the server stopped before the last round was over; was its output closed?")
    watcher.finish(federation.summary, str(folder))
    return federation.summary


def _simulate(federation: Any, clients: int) -> None:
    """Runs the apps in Flower's simulation engine, on the Ray that is running already."""
    # Deprecated with no public replacement: `flwr run` ends in the same engine.
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)  # not before the import, which sets it anew

    from fedsplit.client_app import app

    # A worker that dies is started again; otherwise its slot fails every client it is given from then on.
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0, "max_restarts": 3}
    try:
        run_simulation(federation.app(), app, clients, backend_config={"client_resources": resources})
    finally:
        federation.stop.set()


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 where the run ended well, 1 where it broke, 2 where it was asked for wrongly, 130 on Ctrl-C."""

    def work() -> None:
        config = parse(argv)
        prepare_environment()
        warnings.simplefilter("ignore")
        run(config)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
