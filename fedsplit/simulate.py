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
from fedsplit.config import Config, SettingError
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
    """The parts that have adapters, which sit in blocks, and get gradients under the schedule."""
    from fedsplit.schedules import SCHEDULES

    schedule, (low, high) = SCHEDULES[config.trunk.schedule], config.bounds
    learns = {"bottom": schedule.returns_gradient and low > 0, "trunk": schedule.learns, "top": high < blocks}
    return [part for part, does in learns.items() if does]


def check(config: Config) -> tuple[Path, Any]:
    """Everything that can be found wrong before a model is loaded or a file is written; cheapest first.

    Returns:
        The run's folder, not made yet, and the strategy.

    Raises:
        SettingError: Something was given wrongly.
    """
    from fedsplit.corpus import check_dataset
    from fedsplit.families import read_facts
    from fedsplit.schedules import SCHEDULES

    facts = read_facts(config.model_path)
    if config.bounds[1] > facts.blocks:
        raise SettingError("cut", config.cut, f"LO:HI with 0 <= LO < HI <= {facts.blocks}, the model's blocks")
    if not learning_parts(config, facts.blocks):
        words = f"a cut that leaves blocks to a part that learns under the trunk schedule {config.trunk.schedule}"
        raise SettingError("cut", config.cut, words)
    if config.trunk.schedule == "batched" and config.train.micro_batches > 1:
        words = "1 under the trunk schedule batched, which computes the steps of all clients as one"
        raise SettingError("train.micro_batches", config.train.micro_batches, words)
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
    if strange := [name for name in config.lora.targets if name not in facts.family.targets]:
        raise SettingError("lora.targets", strange[0], ",".join(facts.family.targets))
    check_dataset(config.dataset)

    from fedsplit.devices import check_devices

    check_devices(config)

    from fedsplit.aggregation import strategy_defaults
    from fedsplit.checkpoint import check_folder, check_resumable
    from fedsplit.heldout import shards_of
    from fedsplit.quantization import check_quantization
    from fedsplit.split import check_checkpoint
    from fedsplit.strategy import check_strategy, load_strategy

    folder = Path(config.resume or config.out or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    if config.resume:
        check_resumable(folder, config.rounds)
    else:
        check_folder(folder)
    check_checkpoint(config.model_path)
    strategy = load_strategy(config.strategy, config.strategy_options, strategy_defaults(config))
    check_strategy(strategy, config)
    check_quantization(config)
    shards_of(config)
    return folder, strategy


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
    micro_batches = 2 if at_once < cores and not SCHEDULES[config.trunk.schedule].gathers else 1
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
    folder, strategy = check(config)

    from fedsplit.actor import start_cluster, start_trunk, stop_cluster
    from fedsplit.aggregation import FederationFailed
    from fedsplit.checkpoint import RunFolder
    from fedsplit.families import read_facts
    from fedsplit.report import make_watcher
    from fedsplit.server_app import Federation

    shares = plan(config)
    config = replace(config, train=replace(config.train, micro_batches=shares.micro_batches))
    facts = read_facts(config.model_path)
    with make_watcher() as watcher:
        watcher.line(
            f"{config.clients} clients in {shares.workers} processes; "
            f"threads: {shares.client_threads} each, trunk {shares.trunk_threads}; "
            f"micro-batches: {shares.micro_batches}"
        )
        trunk_line = f"blocks {config.cut} of {facts.blocks}, {config.trunk.schedule}"
        watcher.line(f"model {config.model}; trunk: {trunk_line}; strategy: {config.strategy}")
        name = f"trunk-{os.getpid()}-{time.time_ns()}"
        try:
            start_cluster(shares.workers)
            trunk = start_trunk(config, name, shares.trunk_threads)
            check_memory(config, trunk)
            results = RunFolder(folder, config, facts.family, facts.blocks)
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
