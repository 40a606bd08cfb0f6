"""`python -m fedsplit.simulate`: the whole federation on one machine, with one command."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsplit.config import Config, InputError, SettingError, parse

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
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

    facts = read_facts(config.model_path)
    if config.bounds[1] > facts.blocks:
        raise SettingError("cut", config.cut, f"LO:HI with 0 <= LO < HI <= {facts.blocks}, the model's blocks")
    if not learning_parts(config, facts.blocks):
        words = f"a cut that leaves blocks to a part that learns under the trunk schedule {config.trunk.schedule}"
        raise SettingError("cut", config.cut, words)
    if config.train.max_length > facts.positions:
        raise SettingError(
            "train.max_length", config.train.max_length, f"8 to {facts.positions}, the model's positions"
        )
    if strange := [name for name in config.lora.targets if name not in facts.family.targets]:
        raise SettingError("lora.targets", strange[0], ",".join(facts.family.targets))
    check_dataset(config.dataset)

    from fedsplit.aggregation import strategy_defaults
    from fedsplit.checkpoint import check_folder
    from fedsplit.evaluate import shards_of
    from fedsplit.split import check_checkpoint
    from fedsplit.strategy import load_strategy

    folder = Path(config.out or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    check_folder(folder)
    check_checkpoint(config.model_path)
    strategy = load_strategy(config.strategy, config.strategy_options, strategy_defaults(config.clients))
    shards_of(config)
    return folder, strategy


def plan(config: Config) -> tuple[int, int]:
    """How many client processes, and how many threads each of them and the trunk gets.

    Threads that outnumber the cores make every process several times slower.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(config.workers or cores, config.clients)
    return workers, max(1, cores // workers)


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

    workers, threads = plan(config)
    facts = read_facts(config.model_path)
    with make_watcher() as watcher:
        watcher.line(f"{config.clients} clients in {workers} processes; threads of each and of the trunk: {threads}")
        trunk_line = f"blocks {config.cut} of {facts.blocks}, {config.trunk.schedule}"
        watcher.line(f"model {config.model}; trunk: {trunk_line}; strategy: {config.strategy}")
        name = f"trunk-{os.getpid()}-{time.time_ns()}"
        try:
            start_cluster(workers)
            trunk = start_trunk(config, name, threads)
            results = RunFolder(folder, config, facts.family, facts.blocks)
            federation = Federation(config, trunk, name, threads, strategy, results, watcher, started)
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
    try:
        config = parse(argv)
        prepare_environment()
        warnings.simplefilter("ignore")
        run(config)
    except InputError as error:
        print("fedsplit:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedsplit: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "fedsplit":
            raise
        print("fedsplit:", *str(error).split(), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
