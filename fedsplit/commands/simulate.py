"""`python -m fedsplit.simulate`: runs a whole federation on one machine."""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
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
    from fedsplit.client.measures import Measures
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
    folder = Path(config.resume or config.out or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    watchdog = Watchdog(config.startup_deadline)
    with watchdog.guarding("the user's code that the settings name"):
        facts, strategy, measures = _check_settings(config, objects, folder)
    partition = _check_code_and_data(config, objects, facts, strategy, watchdog)
    with watchdog.guarding("the objective or a metric, in its trial,"):
        _check_with_data(config, facts, measures, partition)

    from fedsplit.model.checkpoint_reader import check_checkpoint
    from fedsplit.model.sources import weights_folder

    # Last, since the weights may have to be fetched, and all their values are read.
    folder_of_weights = weights_folder(config, tell=print)
    check_checkpoint(folder_of_weights, config.dtype, len(partition.classes))
    return folder, strategy, partition


def _collect(collector: ErrorCollector, checks: Iterable[Callable[[], object]]) -> None:
    """Calls all checks in order. A check that finds an error does not keep the later checks from being called."""
    for find_errors in checks:
        with collector.collecting():
            find_errors()


def _check_settings(config: Config, objects: Objects, folder: Path) -> tuple[Facts, AnyStrategy, Measures]:
    """Checks the settings by themselves, and against the model's configuration and the machine.

    Args:
        config: Settings of the run.
        objects: Objects in place of names in the settings.
        folder: Folder of the run.

    Returns:
        Facts about the model, the strategy, and the objective with the metrics.

    Raises:
        InputError: A setting is wrong. All errors are reported together.
    """
    from fedsplit.client.measures import load_measures
    from fedsplit.commands import checks
    from fedsplit.corpora.tables import check_dataset, check_packing
    from fedsplit.engines.planning import plan
    from fedsplit.events.user_sinks import check_sinks
    from fedsplit.federation.checkpoint import check_folder
    from fedsplit.federation.resumption import check_resumable
    from fedsplit.federation.strategy import check_strategy
    from fedsplit.model.devices import check_devices
    from fedsplit.model.families import read_facts
    from fedsplit.model.quantization import check_quantization
    from fedsplit.model.sources import config_folder
    from fedsplit.optimization.optim import check_optimizer

    collector = ErrorCollector()
    facts = None
    with collector.collecting():
        facts = read_facts(config_folder(config.model))

    # The order is the order of the messages; and of two errors about one value, the first alone is shown.
    about_settings: list[Callable[[], object]] = [
        partial(checks.check_prompt, config),
        partial(checks.check_training, config),
        partial(checks.check_trunk, config),
        partial(plan, config),
    ]
    if facts is not None:
        about_settings += [
            partial(checks.check_cut, config, facts),
            partial(checks.check_lengths, config, facts),
            partial(checks.check_adapters, config, facts),
            partial(checks.check_experts, config, facts),
        ]
    about_settings += [
        partial(check_packing, config.data),
        partial(check_dataset, config.dataset, config.data),
        partial(check_devices, config),
        partial(check_resumable, folder, config) if config.resume else partial(check_folder, folder),
        partial(check_optimizer, config.train),
        partial(check_sinks, config.sinks, config.sink_options),
        partial(check_quantization, config),
    ]
    _collect(collector, about_settings)

    with collector.collecting():
        given = _given_strategy(objects)
        strategy = given if given is not None else _make_strategy(config, objects)
        check_strategy(strategy, config)
        if facts is not None:
            checks.check_stacked(strategy, config, facts)
    with collector.collecting():
        measures = load_measures(config, objects)
    collector.check()
    assert facts is not None  # else the collector has raised an error
    return facts, strategy, measures


def _given_strategy(objects: Objects) -> AnyStrategy | None:
    """Returns the strategy that a program passed as an object."""
    return cast("AnyStrategy | None", objects.strategy)


def _make_strategy(config: Config, objects: Objects) -> AnyStrategy:
    """Returns a fresh strategy. A strategy that was given as an object is copied."""
    from fedsplit.federation.aggregation import strategy_defaults
    from fedsplit.federation.strategy import load_strategy

    given = _given_strategy(objects)
    if given is not None:
        return copy.deepcopy(given)
    return load_strategy(config.strategy, config.strategy_options, strategy_defaults(config))


def _check_code_and_data(
    config: Config, objects: Objects, facts: Facts, strategy: AnyStrategy, watchdog: Watchdog
) -> Partition:
    """Tries the user's strategy and the adapter method, and reads the data.

    Args:
        config: Settings of the run.
        objects: Objects in place of names in the settings.
        facts: Facts about the model.
        strategy: The strategy.
        watchdog: Ends the wait for a strategy or a data set that hangs.

    Returns:
        The data of all clients.

    Raises:
        InputError: The strategy, the adapter method or the data cannot be used. All errors are reported together.
    """
    # PEFT alone takes seconds to import. A wrong setting has been reported before.
    from fedsplit.adaptation.injection import check_injection
    from fedsplit.corpora.partition import partition_of
    from fedsplit.federation.rehearsal import rehearse
    from fedsplit.federation.strategy import is_builtin

    collector = ErrorCollector()
    if not is_builtin(strategy):
        with collector.collecting(), watchdog.guarding("the strategy, in its trial round,"):
            # Each rehearsal makes its strategies anew: a trial round may leave state in the object.
            rehearse(lambda: _make_strategy(config, objects), config)
    if config.lora.method != "lora" or config.lora.options:
        with collector.collecting():
            check_injection(config, facts.family)
    with collector.collecting(), watchdog.guarding("the data set"):
        partition = partition_of(config)
    collector.check()
    return partition


def _check_with_data(config: Config, facts: Facts, measures: Measures, partition: Partition) -> None:
    """Checks the settings against the data.

    Args:
        config: Settings of the run.
        facts: Facts about the model.
        measures: Objective and metrics.
        partition: The data of all clients.

    Raises:
        InputError: A setting does not fit the data. All errors are reported together.
    """
    from fedsplit.client.measures import check_measures
    from fedsplit.commands import checks
    from fedsplit.results.initial import check_initial

    classes = len(partition.classes)
    about_data: list[Callable[[], object]] = []
    if classes:
        about_data.append(partial(checks.check_classifier, config))
    about_data += [
        partial(check_measures, config, measures, classes),
        partial(checks.check_tokens, config, partition),
        partial(check_initial, config, facts.family, classes),
    ]
    collector = ErrorCollector()
    _collect(collector, about_data)
    collector.check()


def run(config: Config, *, objects: Objects = NOTHING, sinks: Sequence[Sink] = ()) -> dict[str, Any]:
    """Runs a federation.

    Args:
        config: Settings of the run.
        objects: Objects in place of names in the settings; see `fedsplit.run`.
        sinks: Sinks for the events, beside the sinks in the settings.

    Returns:
        The summary, as in summary.json.

    Raises:
        InputError: A setting is wrong. Nothing has been written.
        FederationFailed, RefusedUpdate, TrunkLost: The run broke.
    """
    started = time.perf_counter()
    # Again, for callers from Python: an unprepared Ray would listen on all interfaces, and ask for no token.
    prepare(config.ray.address)
    from fedsplit.federation.resumption import how_to_go_on

    with advised(lambda: how_to_go_on(Path(config.resume) if config.resume else None)):
        folder, strategy, partition = check(config, objects)
    objects = replace(objects, strategy=strategy)

    from fedsplit.corpora.data_summary import as_document
    from fedsplit.corpora.shards import on_disks
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
    from fedsplit.model.sources import config_folder, weights_folder
    from fedsplit.trunk.doors import check_memory

    model_folder = config_folder(config.model)
    content = content_of(partition.shards, model_folder, weights_folder(config), config.init_adapter, code_of(config))
    if config.resume:
        check_content(folder, config, content)
    facts = read_facts(model_folder)
    config, shares = _decide(config, facts)
    watchdog = Watchdog(config.timeout)
    with watchdog.guarding("a sink of the user's, as it is made,"):
        users = [*make_sinks(config.sinks, config.sink_options), *sinks]
    with (
        advised(lambda: how_to_go_on(folder), after_error=lambda: how_to_go_on(folder, only_from_checkpoint=True)),
        Emitter([MetricsFile(folder), SummaryFile(folder), make_screen()], users, watchdog) as emit,
    ):
        if config.ray.address == "local":
            for line in _opening(config, facts, shares, partition):
                emit(Notice(text=line))
        with engine_named(config.engine)(config, shares, objects) as session:
            shares = session.plan
            lines = [] if config.ray.address == "local" else _opening(config, facts, shares, partition)
            for line in (*session.notes, *lines):
                emit(Notice(text=line))
            check_memory(config, session.trunk)
            results = RunFolder(folder, config, facts.family, facts.blocks, content)
            results.save_data(as_document(partition))
            work = workloads(config, partition.shards)
            job = Job(config, strategy, work, results, emit, started, watchdog)
            federation = Federation(job, session, shares.client_threads)
            with on_disks(results.clients, partition.shards):
                del partition  # from here on, each client's data is on its disk alone
                session.play(federation)
        if federation.summary is None:  # rich ends the server's thread without an error if the output is closed
            raise FederationFailed("the server stopped before the last round was over; was its output closed?")
    return federation.summary


def _decide(config: Config, facts: Facts) -> tuple[Config, Plan]:
    """Decides the settings that a user may leave open, so that config.toml in the run's folder holds all values.

    Args:
        config: Settings of the run.
        facts: Facts about the model.

    Returns:
        The settings, and the use of the machine.
    """
    from fedsplit.engines.planning import plan
    from fedsplit.model.sources import pinned

    config = replace(config, router_aux_loss=facts.coefficient(config.router_aux_loss))
    shares = plan(config, facts.width)
    train = replace(config.train, micro_batches=shares.micro_batches)
    return replace(config, model=pinned(config.model), train=train), shares


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
        f"{config.clients} clients in {shares.workers} {'process' if shares.workers == 1 else 'processes'}; "
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
        prepare(config.ray.address)
        warnings.simplefilter("ignore")
        summary = run(config)
        if summary["complete"]:
            return 0
        print(f"fedsplit: the run ended early: {summary['ended']}", file=sys.stderr)
        return ENDED_EARLY

    return exit_code(work, argv)
