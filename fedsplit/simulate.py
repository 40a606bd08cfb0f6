"""`python -m fedsplit.simulate`: the whole federation on one machine, with one command."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsplit.command import exit_code
from fedsplit.config import Config
from fedsplit.environment import prepare
from fedsplit.flags import parse


def check(config: Config) -> tuple[Path, Any, Any]:
    """Everything that can be found wrong before a model is loaded or a file is written; cheapest first.

    Returns:
        The run's folder, not made yet, the strategy, and the data as they are dealt out.

    Raises:
        SettingError: Something was given wrongly.
    """
    from fedsplit import checks
    from fedsplit.corpora.tables import check_dataset, check_packing
    from fedsplit.model.families import read_facts
    from fedsplit.model.sources import about, weights
    from fedsplit.planning import plan

    checks.check_prompt(config)
    facts = read_facts(about(config))
    checks.check_cut(config, facts)
    checks.check_training(config)
    checks.check_trunk(config)
    plan(config)
    checks.check_lengths(config, facts)
    checks.check_adapters(config, facts)
    checks.check_experts(config, facts)
    check_packing(config.data)
    check_dataset(config.dataset, config.data)

    from fedsplit.model.devices import check_devices

    check_devices(config)

    from fedsplit.adaptation.injection import check_injection
    from fedsplit.client.heldout import deal_of
    from fedsplit.client.measures import check_measures, load_measures
    from fedsplit.federation.aggregation import strategy_defaults
    from fedsplit.federation.checkpoint import check_folder, check_resumable
    from fedsplit.federation.rehearsal import rehearse
    from fedsplit.federation.strategy import check_strategy, is_builtin, load_strategy
    from fedsplit.model.quantization import check_quantization
    from fedsplit.model.stored import check_checkpoint
    from fedsplit.optimization.optim import check_optimizer

    folder = Path(config.resume or config.out or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    if config.resume:
        check_resumable(folder, config)
    else:
        check_folder(folder)
    check_optimizer(config.train)

    def make_strategy() -> Any:
        return load_strategy(config.strategy, config.strategy_options, strategy_defaults(config))

    strategy = make_strategy()
    load_measures(config)
    check_strategy(strategy, config)
    checks.check_stacked(strategy, config, facts)
    check_quantization(config)
    if not is_builtin(strategy):
        rehearse(make_strategy, config)
    if config.lora.method != "lora" or config.lora.options:
        check_injection(config, facts.family)
    deal = deal_of(config)
    if deal.classes:
        checks.check_classifier(config)
    check_measures(config, len(deal.classes))
    checks.check_tokens(config, deal)
    folder_of_weights = weights(config, tell=print)  # last: they may have to be fetched first
    check_checkpoint(folder_of_weights, config.dtype, len(deal.classes))
    return folder, strategy, deal


def run(config: Config) -> dict[str, Any]:
    """Runs a federation.

    Returns:
        The summary, as in summary.json.

    Raises:
        InputError: Something was given wrongly; nothing has been written.
        FederationFailed, RefusedUpdate, TrunkLost: The run broke.
    """
    started = time.perf_counter()
    prepare()  # again, for who calls this from Python: Ray would listen on all interfaces, without a token
    folder, strategy, deal = check(config)

    from fedsplit.corpora.census import as_document
    from fedsplit.corpora.shards import on_disks
    from fedsplit.federation import engine
    from fedsplit.federation.aggregation import FederationFailed
    from fedsplit.federation.checkpoint import RunFolder, check_content
    from fedsplit.federation.manifest import content_of
    from fedsplit.federation.server_app import Federation
    from fedsplit.federation.workload import workloads
    from fedsplit.model.families import read_facts
    from fedsplit.model.sources import about, pinned, weights
    from fedsplit.planning import plan
    from fedsplit.report import make_watcher
    from fedsplit.trunk import cluster
    from fedsplit.trunk.actor import check_memory, start_trunk

    content = content_of(deal.shards, about(config), weights(config))
    if config.resume:
        check_content(folder, config, content)
    facts = read_facts(about(config))
    config = replace(config, router_aux_loss=facts.coefficient(config.router_aux_loss))
    shares = plan(config, facts.width)
    config = replace(config, model=pinned(config), train=replace(config.train, micro_batches=shares.micro_batches))
    with make_watcher() as watcher:
        for line in _opening(config, facts, shares, deal):
            watcher.line(line)
        name = f"trunk-{os.getpid()}-{time.time_ns()}"
        with cluster.running(shares.workers):
            trunk = start_trunk(config, name, shares.trunk_threads, shares.trunk_lanes)
            check_memory(config, trunk)
            results = RunFolder(folder, config, facts.family, facts.blocks, content)
            results.save_data(as_document(deal))
            machine = shares.workers, shares.client_threads
            work = workloads(config, deal.shards)
            federation = Federation(config, trunk, name, *machine, work, strategy, results, watcher, started)
            with on_disks(results.clients, deal.shards):
                engine.simulate(federation, config.clients)
    if federation.summary is None:  # rich ends the server's thread without an error when nobody reads on
        raise FederationFailed("the server stopped before the last round was over; was its output closed?")
    watcher.finish(federation.summary, str(folder))
    return federation.summary


def _opening(config: Config, facts: Any, shares: Any, deal: Any) -> list[str]:
    """What is said before a run begins: who has how much of the machine, the model, and the data where there is need.

    Args:
        config: The run's.
        facts: The model's `fedsplit.model.families.Facts`.
        shares: A `fedsplit.planning.Plan`.
        deal: A `fedsplit.corpora.partition.Deal`.
    """
    from fedsplit.corpora.census import stated, table

    kind = f"; adapters: {config.lora.method}" if config.lora.method != "lora" else ""
    return [
        f"{config.clients} clients in {shares.workers} processes; "
        f"threads: {shares.client_threads} each, trunk {shares.trunk_lanes} x {shares.trunk_threads}; "
        f"micro-batches: {shares.micro_batches}",
        f"model {config.model}; trunk: blocks {config.cut} of {facts.blocks}, {config.trunk.schedule}; "
        f"strategy: {config.strategy}{kind}",
        *stated(deal),
        *(table(deal) if config.data.show else []),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.command.exit_code` for what it returns."""

    def work() -> None:
        config = parse(argv)
        prepare()
        warnings.simplefilter("ignore")
        run(config)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
