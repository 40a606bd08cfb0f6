"""All checks of a run, in order: settings, the user's code, the data, and the settings against the data."""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fedsplit.environment import prepare
from fedsplit.errors import ErrorCollector, UnknownValue
from fedsplit.objects import NOTHING, Objects
from fedsplit.settings.choices import PAIRS
from fedsplit.settings.config import Config
from fedsplit.settings.drafts import Draft
from fedsplit.watchdog import Watchdog

if TYPE_CHECKING:
    from fedsplit.client.measures import Measures
    from fedsplit.corpora.sharding import Partition
    from fedsplit.federation.strategy import FlowerLike, Strategy
    from fedsplit.model.facts import Facts

    AnyStrategy = Strategy | FlowerLike


_USERS_CODE = "the user's code that the settings name"
"""Words for what is guarded while the user's code is loaded. Our own code is not: its imports alone take seconds."""


def check(
    config: Config, objects: Objects = NOTHING, read: Callable[[Config], Partition] | None = None
) -> tuple[Path, AnyStrategy, Partition]:
    """Checks everything that can be checked before a model is loaded or a file is written.

    All errors that are found without reading data are reported together. The data are read only if there are none.

    Args:
        config: Settings of the run.
        objects: Objects in place of names in the settings.
        read: Reads the data of all clients; None for `fedsplit.corpora.partition.partition_of`.

    Returns:
        The run's folder, which does not exist yet, the strategy, and the data of all clients.

    Raises:
        SettingError: A setting is wrong, or does not fit the model, the data or the machine.
        InputErrors: Several settings are wrong. Settings are reported together, then what the data show.
    """
    from fedsplit.client.measures import check_format, check_reference, load_measures
    from fedsplit.federation.strategy import traits_of

    watchdog = Watchdog(config.startup_deadline)
    facts, strategy, measures = _check_settings(config, objects, watchdog)
    _check_proof(config, facts)
    partition = _check_code_and_data(config, objects, facts, strategy, watchdog, read)
    config = with_format(config, partition.format)
    if partition.format == PAIRS:  # measured by metrics of their own
        check_format(config, measures, partition.format)
        with watchdog.guarding(_USERS_CODE):
            measures = load_measures(config, objects)
        check_reference(config, measures, traits_of(strategy).folds)
    _check_with_data(config, facts, measures, partition, watchdog)

    from fedsplit.model.checkpoint_reader import check_checkpoint
    from fedsplit.model.sources import weights_folder

    # Last, since the weights may have to be fetched, and all their values are read.
    folder_of_weights = weights_folder(config, tell=_teller(config))
    check_checkpoint(folder_of_weights, config.dtype, len(partition.classes))
    return _folder_of(config), strategy, partition


def _teller(config: Config) -> Callable[[str], None]:
    """Returns the function that tells a line before a run has a screen."""
    if config.quiet:
        return lambda line: None
    # Under --json, standard output holds JSON alone.
    return partial(print, file=sys.stderr if config.json else sys.stdout)


def _check_proof(config: Config, facts: Facts) -> None:
    """Checks that the parts of the model are exactly the model. A new type is proved first, in seconds.

    Args:
        config: Settings of the run.
        facts: Facts about the model.

    Raises:
        SettingError: The parts differ from the model.
    """
    if config.unproved:
        _teller(config)("the parts of the model are not compared with the uncut model (--unproved true)")
        return

    from fedsplit.model.sources import config_folder
    from fedsplit.proving.kept import proof_of
    from fedsplit.proving.proof import require

    classifies = config.data.format == "classification"
    proof = proof_of(config_folder(config.model), tell=_teller(config), classifies=classifies)
    require(proof, config, facts.blocks)


def with_format(config: Config, format: str) -> Config:
    """Returns settings that name the format of the data, if the data are pairs.

    Trunk, clients and commands after the run then know of the pairs without reading data.

    Args:
        config: Settings of a run.
        format: Format of the data.

    Example:
        >>> with_format(Config(), "preference").data.format, with_format(Config(), "chat").data.format
        ('preference', 'auto')
    """
    if format != PAIRS:
        return config
    return replace(config, data=replace(config.data, format=PAIRS))


def _folder_of(config: Config) -> Path:
    """Returns the folder of a run that begins or goes on now."""
    return Path(config.resume or config.out or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")


def _check_settings(config: Config, objects: Objects, watchdog: Watchdog) -> tuple[Facts, AnyStrategy, Measures]:
    """Checks the settings by themselves, and against the model's configuration and the machine.

    Args:
        config: Settings of the run.
        objects: Objects in place of names in the settings.
        watchdog: Ends the wait for the user's code that hangs as it is imported or made.

    Returns:
        Facts about the model, the strategy, and the objective with the metrics.

    Raises:
        InputError: A setting is wrong. All errors are reported together.
    """
    from fedsplit.client.measures import check_pairs, check_reference, load_measures
    from fedsplit.commands import model_checks
    from fedsplit.federation.strategy import check_strategy, traits_of
    from fedsplit.model.facts import read_facts
    from fedsplit.model.sources import config_folder
    from fedsplit.objectives.objective import demands_of

    collector = ErrorCollector()
    facts = None
    with collector.collecting():
        facts = read_facts(config_folder(config.model))
    collector.collect(_checks_of_settings(config, facts, watchdog))

    folds = False  # also for a strategy that cannot be made, which is an error of its own
    with collector.collecting():
        with watchdog.guarding(_USERS_CODE):
            given = _given_strategy(objects)
            strategy = given if given is not None else _make_strategy(config, objects)
            folds = traits_of(strategy).folds
            check_strategy(strategy, config)
        if facts is not None:
            model_checks.check_stacked(strategy, config, facts)
    with collector.collecting(), watchdog.guarding(_USERS_CODE):
        measures = load_measures(config, objects)
        check_pairs(config, demands_of(measures[0]))
        check_reference(config, measures, folds)
    collector.check()
    assert facts is not None  # else the collector has raised an error
    return facts, strategy, measures


def _checks_of_settings(
    config: Config,
    facts: Facts | None,
    watchdog: Watchdog,
) -> list[Callable[[], object]]:
    """Returns the checks of settings that need neither the strategy nor the data.

    The order is the order of the messages. Of two errors about one value, only the first is shown. A check reads the
    settings when it is called, and not earlier: so a refused value ends the checks that read the value, and no others.

    Args:
        config: Settings of the run.
        facts: Facts about the model; None if the model cannot be found, which leaves out the checks against the model.
        watchdog: Ends the wait for a sink of the user that hangs while it is loaded.
    """
    from fedsplit.commands import checks, model_checks, server_checks
    from fedsplit.corpora.tables import check_dataset, check_packing
    from fedsplit.engines.planning import plan
    from fedsplit.events.user_sinks import check_sinks
    from fedsplit.model.devices import check_devices
    from fedsplit.model.quantization import check_quantization
    from fedsplit.network.network_checks import check_network
    from fedsplit.optimization.optim import check_optimizer
    from fedsplit.tracking.trackers import check_trackers
    from fedsplit.wire.tls import check_certificates

    def check_sinks_of_user() -> None:
        with watchdog.guarding(_USERS_CODE):
            check_sinks(config.sinks, config.sink_options)

    def check_data_set() -> None:
        with watchdog.guarding(_USERS_CODE):  # `module:load` imports the user's module
            check_dataset(config.dataset, config.data)

    def check_mods_of_user() -> None:
        checks.check_mods(config)
        if config.mods or config.mod_options:
            from fedsplit.federation.mods import load_mods  # imports Flower, which takes seconds

            with watchdog.guarding(_USERS_CODE):
                load_mods(config)

    about_settings: list[Callable[[], object]] = [
        lambda: checks.check_prompt(config),
        lambda: checks.check_training(config),
        lambda: checks.check_trunk(config),
        lambda: checks.check_places(config),
        lambda: server_checks.check_remote(config),
        lambda: check_network(config),
        lambda: plan(config),
    ]
    if facts is not None:
        about_settings += [
            partial(model_checks.check_cut, config, facts),
            partial(model_checks.check_lengths, config, facts),
            partial(model_checks.check_adapters, config, facts),
            partial(model_checks.check_experts, config, facts),
            lambda: _check_pieces(config),
        ]
    about_settings += [
        lambda: check_packing(config.data),
        check_data_set,
        lambda: check_devices(config),
        lambda: _check_run_folder(config),
        lambda: check_optimizer(config.train),
        check_sinks_of_user,
        check_mods_of_user,
        lambda: check_trackers(config.track),
        lambda: check_quantization(config),
        lambda: check_certificates(config.wire.tls),
        lambda: _check_server(config),
        lambda: _check_push(config),
    ]
    return about_settings


def _check_server(config: Config) -> None:
    """Checks token and certificates for the trunk's server, if the run uses one.

    Raises:
        SettingError: The token or the certificates cannot be used.
    """
    if config.trunk.server:
        from fedsplit.trunk.dialing import check_server  # gRPC takes a moment to import

        check_server(config)


def _check_push(config: Config) -> None:
    """Checks that the adapter can be uploaded at the end, if that is asked for.

    Raises:
        SettingError: There is no token that the Hub accepts, or the Hub cannot be reached.
    """
    if config.push_to_hub:
        from fedsplit.results.publishing import check_access

        check_access(config.push_to_hub)


def _check_pieces(config: Config) -> None:
    """Checks that the trunk's projections can be cut into pieces for several processes, under tensor parallelism.

    Raises:
        InputError: A projection cannot be cut.
    """
    if config.trunk.tensor_parallel > 1:
        from fedsplit.trunk.shard_group import check_tensor_parallel  # PEFT alone takes seconds to import

        check_tensor_parallel(config)


def _check_run_folder(config: Config) -> None:
    """Checks that the folder of a new run can be made, or that a resumed run can go on in its folder.

    Raises:
        SettingError: The folder cannot be made, or the run in the folder cannot go on.
    """
    from fedsplit.federation.checkpoint import check_folder
    from fedsplit.federation.resumption import check_resumable

    folder = _folder_of(config)
    if config.resume:
        check_resumable(folder, config)
    else:
        check_folder(folder)


def checked(draft: Draft, objects: Objects = NOTHING) -> Config:
    """Returns the configuration of a draft without errors. The configuration still needs `check`.

    Args:
        draft: The draft.
        objects: Objects in place of names in the settings.

    Raises:
        InputError: A setting of the draft is wrong. The errors in all other settings are reported together with the
            first.
    """

    def check_others(config: Config) -> None:
        prepare()
        warnings.simplefilter("ignore")
        # The default deadline, as the user's may be the wrong setting.
        _check_settings(config, objects, Watchdog(Config.startup_deadline))

    return draft.checked(check_others)


def _given_strategy(objects: Objects) -> AnyStrategy | None:
    """Returns the strategy that a program passed as an object."""
    return cast("AnyStrategy | None", objects.strategy)


def _make_strategy(config: Config, objects: Objects) -> AnyStrategy:
    """Returns a fresh strategy. A strategy that was given as an object is copied."""
    from fedsplit.federation.aggregation import strategy_defaults
    from fedsplit.federation.strategy import load_strategy
    from fedsplit.loading import STRATEGY, find

    given = _given_strategy(objects)
    if given is not None:
        return copy.deepcopy(given)
    try:
        options = config.strategy_options
        defaults = strategy_defaults(config)
    except UnknownValue:
        find(STRATEGY, config.strategy)  # without its arguments, at least the name can be checked
        raise
    return load_strategy(config.strategy, options, defaults)


def _check_code_and_data(
    config: Config,
    objects: Objects,
    facts: Facts,
    strategy: AnyStrategy,
    watchdog: Watchdog,
    read: Callable[[Config], Partition] | None,
) -> Partition:
    """Tries the user's strategy and the adapter method, and reads the data.

    Args:
        config: Settings of the run.
        objects: Objects in place of names in the settings.
        facts: Facts about the model.
        strategy: The strategy.
        watchdog: Ends the wait for a strategy or a data set that hangs.
        read: Reads the data; None for `fedsplit.corpora.partition.partition_of`.

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
    if not is_builtin(strategy) or config.mods:  # our own strategies have tests
        with collector.collecting(), watchdog.guarding("the strategy, in its trial round,"):
            # Each rehearsal makes its strategies anew: a trial round may leave state in the object.
            rehearse(lambda: _make_strategy(config, objects), config)
    if config.lora.method != "lora" or config.lora.options:
        with collector.collecting():
            check_injection(config, facts.family)
    with collector.collecting(), watchdog.guarding("the data set"):
        partition = (read or partition_of)(config)
    collector.check()
    return partition


def _check_with_data(
    config: Config, facts: Facts, measures: Measures, partition: Partition, watchdog: Watchdog
) -> None:
    """Checks the settings against the data.

    Args:
        config: Settings of the run.
        facts: Facts about the model.
        measures: Objective and metrics.
        partition: The data of all clients.
        watchdog: Ends the wait for an objective or a metric that hangs.

    Raises:
        InputError: A setting does not fit the data. All errors are reported together.
    """
    from fedsplit.client.measures import check_format, check_measures
    from fedsplit.commands import model_checks
    from fedsplit.network.network_checks import check_client_names
    from fedsplit.results.initial import check_initial

    classes = len(partition.classes)

    def check_measures_of_user() -> None:
        with watchdog.guarding("the objective or a metric, in its trial,"):
            check_measures(config, measures, classes)

    about_data: list[Callable[[], object]] = []
    if classes:
        about_data.append(partial(model_checks.check_classifier, config))
    about_data += [
        lambda: check_client_names(config, [shard.name for shard in partition.shards]),
        partial(check_format, config, measures, partition.format),
        check_measures_of_user,
        partial(model_checks.check_tokens, config, partition),
        partial(check_initial, config, facts.family, classes),
    ]
    collector = ErrorCollector()
    collector.collect(about_data)
    collector.check()
