"""`python -m fedsplit.simulate`: runs a whole federation on one machine."""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedsplit.commands.exit_codes import ENDED_EARLY, exit_code
from fedsplit.environment import prepare
from fedsplit.errors import ErrorCollector
from fedsplit.events import Sink
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.config import Config
from fedsplit.settings.flags import parse
from fedsplit.shutdown import advised
from fedsplit.watchdog import Watchdog

if TYPE_CHECKING:
    from fedsplit.corpora.sharding import Partition
    from fedsplit.engines.planning import Plan
    from fedsplit.federation.strategy import FlowerLike, Strategy
    from fedsplit.model.families import Facts

    AnyStrategy = Strategy | FlowerLike


def check(config: Config, objects: Objects = NOTHING) -> tuple[Path, AnyStrategy, Partition]:
    """Checks everything that can be checked before a model is loaded or a file is written.

    All errors that are found without reading data are reported together. The data are read only if there are none.

    Args:
        config: Settings of the run.
        objects: Objects in place of names in the settings.

    Returns:
        The run's folder, which does not exist yet, the strategy, and the data of all clients.

    Raises:
        SettingError: A setting is wrong, or does not fit the model, the data or the machine.
        InputErrors: Several settings are wrong. Settings are reported together, then what the data show.
    """
    from fedsplit.commands import checks
    from fedsplit.corpora.tables import check_dataset, check_packing
    from fedsplit.engines.planning import plan
    from fedsplit.model.families import read_facts
    from fedsplit.model.sources import config_folder, weights_folder

    collector = ErrorCollector()
    facts = None
    with collector.collecting():
        facts = read_facts(config_folder(config.model))
    with collector.collecting():
        checks.check_prompt(config)
    with collector.collecting():
        checks.check_training(config)
    with collector.collecting():
        checks.check_trunk(config)
    with collector.collecting():
        plan(config)
    if facts is not None:
        for check_facts in (checks.check_cut, checks.check_lengths, checks.check_adapters, checks.check_experts):
            with collector.collecting():
                check_facts(config, facts)
    with collector.collecting():
        check_packing(config.data)
    with collector.collecting():
        check_dataset(config.dataset, config.data)

    from fedsplit.events.user_sinks import check_sinks
    from fedsplit.federation.checkpoint import check_folder
    from fedsplit.federation.resumption import check_resumable
    from fedsplit.model.devices import check_devices
    from fedsplit.model.quantization import check_quantization
    from fedsplit.optimization.optim import check_optimizer

    folder = Path(config.resume or config.out or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    with collector.collecting():
        check_devices(config)
    with collector.collecting():
        if config.resume:
            check_resumable(folder, config)
        else:
            check_folder(folder)
    with collector.collecting():
        check_optimizer(config.train)
    with collector.collecting():
        check_sinks(config.sinks, config.sink_options)
    with collector.collecting():
        check_quantization(config)

    from fedsplit.client.measures import check_measures, load_measures
    from fedsplit.federation.aggregation import strategy_defaults
    from fedsplit.federation.strategy import check_strategy, is_builtin, load_strategy

    def make_strategy() -> AnyStrategy:
        # A copy, since a rehearsal may leave state in the object.
        if objects.strategy is not None:
            return copy.deepcopy(cast("AnyStrategy", objects.strategy))
        return load_strategy(config.strategy, config.strategy_options, strategy_defaults(config))

    with collector.collecting():
        strategy = make_strategy() if objects.strategy is None else cast("AnyStrategy", objects.strategy)
        check_strategy(strategy, config)
        if facts is not None:
            checks.check_stacked(strategy, config, facts)
    with collector.collecting():
        measures = load_measures(config, objects)
    collector.check()
    assert facts is not None  # else the collector has raised an error

    from fedsplit.adaptation.injection import check_injection
    from fedsplit.corpora.partition import partition_of
    from fedsplit.federation.rehearsal import rehearse
    from fedsplit.model.checkpoint_reader import check_checkpoint
    from fedsplit.results.initial import check_initial

    watchdog = Watchdog(config.startup_deadline)
    if not is_builtin(strategy):
        with collector.collecting(), watchdog.looking(), watchdog.doing("the strategy, in its trial round,"):
            rehearse(make_strategy, config)
    if config.lora.method != "lora" or config.lora.options:
        with collector.collecting():
            check_injection(config, facts.family)
    with collector.collecting(), watchdog.looking(), watchdog.doing("the data set"):
        partition = partition_of(config)
    collector.check()

    classes = len(partition.classes)
    if classes:
        with collector.collecting():
            checks.check_classifier(config)
    with collector.collecting():
        check_measures(config, measures, classes)
    with collector.collecting():
        checks.check_tokens(config, partition)
    with collector.collecting():
        check_initial(config, facts.family, classes)
    collector.check()
    # Last, since the weights may have to be fetched, and all their values are read.
    folder_of_weights = weights_folder(config, tell=print)
    check_checkpoint(folder_of_weights, config.dtype, classes)
    return folder, strategy, partition


def run(config: Config, *, objects: Objects = NOTHING, sinks: Sequence[Sink] = ()) -> dict[str, Any]:
    """Runs a federation.

    Args:
        config: Settings of the run.
        objects: Objects in place of names in the settings; see `fedsplit.run`.
        sinks: Sinks that receive the events, beside the sinks that the settings name.

    Returns:
        The summary, as in summary.json.

    Raises:
        InputError: A setting is wrong. Nothing has been written.
        FederationFailed, RefusedUpdate, TrunkLost: The run broke.
    """
    started = time.perf_counter()
    prepare()  # again, for callers from Python: without it Ray would listen on all interfaces, without a token
    from fedsplit.federation.resumption import how_to_go_on

    with advised(lambda: how_to_go_on(Path(config.resume) if config.resume else None)):
        folder, strategy, partition = check(config, objects)
    objects = replace(objects, strategy=strategy)

    from fedsplit.corpora.data_summary import as_document
    from fedsplit.corpora.shards import on_disks
    from fedsplit.engines.planning import plan
    from fedsplit.engines.session import engine_named
    from fedsplit.events.emitter import Emitter
    from fedsplit.events.event_types import Notice
    from fedsplit.events.run_files import MetricsFile, SummaryFile
    from fedsplit.events.screen import make_screen
    from fedsplit.events.user_sinks import make_sinks
    from fedsplit.federation.checkpoint import RunFolder
    from fedsplit.federation.clients import FederationFailed
    from fedsplit.federation.federation import Federation, Job
    from fedsplit.federation.manifest import code_of, content_of
    from fedsplit.federation.resumption import check_content
    from fedsplit.federation.workload import workloads
    from fedsplit.model.families import read_facts
    from fedsplit.model.sources import config_folder, pinned, weights_folder
    from fedsplit.trunk.doors import check_memory

    content = content_of(
        partition.shards, config_folder(config.model), weights_folder(config), config.init_adapter, code_of(config)
    )
    if config.resume:
        check_content(folder, config, content)
    facts = read_facts(config_folder(config.model))
    config = replace(config, router_aux_loss=facts.coefficient(config.router_aux_loss))
    shares = plan(config, facts.width)
    train = replace(config.train, micro_batches=shares.micro_batches)
    config = replace(config, model=pinned(config.model), train=train)
    users = [*make_sinks(config.sinks, config.sink_options), *sinks]
    with (
        advised(lambda: how_to_go_on(folder)),
        Emitter([MetricsFile(folder), SummaryFile(folder), make_screen()], users) as emit,
    ):
        for line in _opening(config, facts, shares, partition):
            emit(Notice(text=line))
        with engine_named(config.engine)(config, shares, objects) as session:
            check_memory(config, session.trunk)
            results = RunFolder(folder, config, facts.family, facts.blocks, content)
            results.save_data(as_document(partition))
            work = workloads(config, partition.shards)
            job = Job(config, strategy, work, results, emit, started, Watchdog(config.timeout))
            federation = Federation(job, session, shares.client_threads)
            with on_disks(results.clients, partition.shards):
                session.play(federation)
        if federation.summary is None:  # rich ends the server's thread without an error if the output is closed
            raise FederationFailed("the server stopped before the last round was over; was its output closed?")
    return federation.summary


def _opening(config: Config, facts: Facts, shares: Plan, partition: Partition) -> list[str]:
    """Returns the lines on the screen before a run begins: the use of the machine, the model, and notes on the data.

    Args:
        config: Settings of the run.
        facts: Facts about the model.
        shares: Use of the machine.
        partition: The data of all clients.
    """
    from fedsplit.corpora.data_summary import data_notes, table
    from fedsplit.results import initial

    kind = f"; adapters: {config.lora.method}" if config.lora.method != "lora" else ""
    return [
        f"{config.clients} clients in {shares.workers} processes; "
        f"threads: {shares.client_threads} each, trunk {shares.trunk_lanes} x {shares.trunk_threads}; "
        f"micro-batches: {shares.micro_batches}",
        f"model {config.model}; trunk: blocks {config.cut} of {facts.blocks}, {config.trunk.schedule}; "
        f"strategy: {config.strategy}{kind}",
        *initial.stated(config),
        *data_notes(partition),
        *(table(partition) if config.data.show else []),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> int:
        config = parse(argv)
        prepare()
        warnings.simplefilter("ignore")
        summary = run(config)
        if summary["complete"]:
            return 0
        print(f"fedsplit: the run ended early: {summary['ended']}", file=sys.stderr)
        return ENDED_EARLY

    return exit_code(work, argv)
