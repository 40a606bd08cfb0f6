"""`python -m fedsplit.simulate`: runs a whole federation on one machine."""

from __future__ import annotations

import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.commands.exit_codes import ENDED_EARLY, exit_code
from fedsplit.commands.run_checks import check, checked, with_format
from fedsplit.environment import prepare
from fedsplit.errors import InputError, SettingError
from fedsplit.events import Sink
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.config import Config
from fedsplit.settings.flags import read_draft
from fedsplit.settings.sections import TrunkSettings
from fedsplit.shutdown import advised
from fedsplit.watchdog import Watchdog

if TYPE_CHECKING:
    from fedsplit.corpora.sharding import Partition
    from fedsplit.engines.planning import Plan
    from fedsplit.engines.session import Open
    from fedsplit.events.emitter import Emit
    from fedsplit.federation.manifest import Content
    from fedsplit.model.facts import Facts


def run(
    config: Config,
    *,
    objects: Objects = NOTHING,
    sinks: Sequence[Sink] = (),
    read: Callable[[Config], Partition] | None = None,
    opens: Open | None = None,
) -> dict[str, Any]:
    """Runs a federation.

    Args:
        config: Settings of the run.
        objects: Objects in place of names in the settings; see `fedsplit.run`.
        sinks: Sinks for the events, beside the sinks in the settings.
        read: Reads the data of all clients; None for `fedsplit.corpora.partition.partition_of`.
        opens: Starts the engine; None for the engine that the settings name.

    Returns:
        The summary, as in summary.json.

    Raises:
        InputError: A setting is wrong. Nothing has been written.
        FederationFailed, RefusedUpdate, TrunkLost: The run broke.
    """
    started = time.perf_counter()
    # Again, for callers from Python: an unprepared Ray would listen on all interfaces, and ask for no token.
    prepare(config.ray.address)
    from fedsplit.durable import writing
    from fedsplit.federation.resumption import how_to_go_on
    from fedsplit.state.run_lock import lock

    # A run that is stopped during the checks has no folder yet, unless the run goes on in an older folder.
    resumed = Path(config.resume) if config.resume else None
    if config.data.at == "site" and opens is None:
        raise SettingError("data.at", "site", "driver | shared | label; with flwr run, each client may be a site")
    with advised(lambda: how_to_go_on(resumed)):
        folder, strategy, partition = check(config, objects, read)
    if resumed is not None:
        # Before an engine starts: a trunk's server would take the trunk from the command that is at work in the folder.
        with writing(resumed):
            lock(resumed).close()
    config = replace(with_format(config, partition.format), out=str(folder))
    objects = replace(objects, strategy=strategy)  # from here on, a strategy by name is an object, too

    from fedsplit.corpora.data_summary import as_document
    from fedsplit.corpora.shards import on_disks
    from fedsplit.engines.session import engine_named
    from fedsplit.events.emitter import Emitter
    from fedsplit.events.run_files import MetricsFile, SummaryFile
    from fedsplit.events.screen import screen_for
    from fedsplit.events.user_sinks import make_sinks
    from fedsplit.federation.checkpoint import RunFolder
    from fedsplit.federation.clients import FederationFailed
    from fedsplit.federation.federation import Federation, Job
    from fedsplit.federation.workload import workloads
    from fedsplit.model.facts import read_facts
    from fedsplit.model.sources import config_folder
    from fedsplit.tracking.trackers import make_trackers
    from fedsplit.trunk.doors import check_memory

    facts = read_facts(config_folder(config.model))
    content = _content_of(config, folder, partition)
    config, shares = _decide(config, facts)

    watchdog = Watchdog(config.timeout)
    with watchdog.guarding("a sink of the user's, as it is made,"):
        users_sinks = [*make_sinks(config.sinks, config.sink_options), *make_trackers(config.track), *sinks]
    own_sinks: list[Sink] = [MetricsFile(folder), SummaryFile(folder), screen_for(config)]
    with (
        advised(lambda: how_to_go_on(folder), after_error=lambda: how_to_go_on(folder, only_from_checkpoint=True)),
        Emitter(own_sinks, users_sinks, watchdog) as emit,
    ):
        is_private = config.ray.address == "local"
        if is_private:
            _say(emit, _opening(config, facts, shares, partition))
        with (opens or engine_named(config.engine))(config, shares, objects) as session:
            _say(emit, session.notes)
            if not is_private:  # the nodes of a cluster decide about the processes
                _say(emit, _opening(config, facts, session.plan, partition))
            config = session.weigh()
            check_memory(config, session.trunk)

            # The folder of the run is made here, after everything that can be wrong at the start.
            results = RunFolder(folder, config, facts.family, facts.blocks, content)
            results.save_data(as_document(partition))
            at_sites = config.data.at == "site"  # then the sites tell the sizes of their data
            work = None if at_sites else workloads(config, [shard.size for shard in partition.shards])
            job = Job(config, strategy, work, results, emit, started, watchdog)
            federation = Federation(job, session, session.plan.client_threads)
            with on_disks(results.clients, partition.shards):
                del partition  # from here on, each client's data is on its disk alone
                session.play(federation)
        if config.report and federation.summary is not None:
            _leave_report(folder, emit)
        if config.push_to_hub and federation.summary is not None:
            _push(folder, config.push_to_hub, emit)
        if federation.summary is None:  # rich ends the server's thread without an error if the output is closed
            raise FederationFailed("the server stopped before the last round was over; was its output closed?")
    return federation.summary


def _push(folder: Path, repository: str, emit: Emit) -> None:
    """Uploads the adapter of a run that has ended. If that fails, a line says how to try again."""
    from fedsplit.events.event_types import Notice
    from fedsplit.results.finished import open_run
    from fedsplit.results.publishing import push

    try:
        run = open_run(folder)
        run.check_shared()
        address = push(run.adapter(), repository)
    except (InputError, OSError) as error:
        again = f"fedsplit adapters push {shlex.quote(str(folder))} {repository}"
        emit(Notice(text=f"{error}; {again} tries again", warning=True))
    else:
        emit(Notice(text=f"the adapter is on the Hub: {address}"))


def _leave_report(folder: Path, emit: Emit) -> None:
    """Writes the page about a run that has ended. If that fails, a line says why."""
    from fedsplit.events.event_types import Notice
    from fedsplit.reporting.page import try_report

    problem = try_report(folder)
    if problem:
        emit(Notice(text=problem, warning=True))


def _content_of(config: Config, folder: Path, partition: Partition) -> Content:
    """Returns digests of a run's data, model and code, after checking that a resumed run has its original ones.

    Raises:
        SettingError: The data, the model or the code has changed since the run began.
    """
    from fedsplit.federation.manifest import code_of, content_of
    from fedsplit.federation.resumption import check_content
    from fedsplit.model.sources import config_folder, weights_folder

    model = config_folder(config.model)
    content = content_of(partition.shards, model, weights_folder(config), config.init_adapter, code_of(config))
    if config.resume:
        check_content(folder, config, content)
    return content


def _say(emit: Emit, lines: Iterable[str]) -> None:
    """Shows lines on the screen, and to the user's sinks."""
    from fedsplit.events.event_types import Notice

    for line in lines:
        emit(Notice(text=line))


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
    from fedsplit.formatting import counted
    from fedsplit.results import initial

    clients = f"{config.clients} clients"
    if config.data.at != "site":  # processes at sites are the sites' business
        threads = counted(shares.client_threads, "thread", "threads")
        clients += f" in {counted(shares.workers, 'process', 'processes')} of {threads}"
    steps = counted(shares.trunk_lanes, "step", "steps")
    use_of_trunk = f"{steps} at a time, {counted(shares.trunk_threads, 'thread', 'threads')} each"
    use_of_machine = f"{clients}; trunk: {config.trunk.server or use_of_trunk}; micro-batches: {shares.micro_batches}"
    trunk = f"blocks {config.cut} of {facts.blocks}, {config.trunk.schedule}{_trunks(config.trunk)}"
    learning = f"model {config.model}; trunk: {trunk}; strategy: {config.strategy}"
    if config.lora.method != "lora":
        learning += f"; adapters: {config.lora.method}"

    lines = [use_of_machine, learning, *initial.stated(config), *data_notes(partition)]
    if config.data.show:
        lines += table(partition)
    return lines


def _trunks(trunk: TrunkSettings) -> str:
    """Returns words for stages and replicas of a trunk; an empty text for a trunk in one piece."""
    words = ""
    if trunk.stages:
        words += f", stages {trunk.stages}"
    if trunk.replicas > 1:
        words += f", {trunk.replicas} replicas"
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> int:
        config = checked(read_draft(argv))
        prepare(config.ray.address)
        warnings.simplefilter("ignore")  # libraries warn of much that no user can change
        summary = run(config)
        if summary["complete"]:
            return 0
        print(f"fedsplit: the run ended early: {summary['ended']}", file=sys.stderr)
        return ENDED_EARLY

    return exit_code(work, argv)
