"""Aggregation strategies: the interface, loading by name, and checks against the settings of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from torch import Tensor

from fedsplit.adaptation.methods import draws_fresh, method_of
from fedsplit.errors import SettingError, check_all
from fedsplit.federation.clients import FederationFailed
from fedsplit.loading import BUILTIN, STRATEGY, builtin_package, described, find, make
from fedsplit.settings.choices import PARTS
from fedsplit.settings.config import Config
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, Traits

if TYPE_CHECKING:
    from fedsplit.model.parts import Kind

State = Mapping[str, Tensor]
"""State of a strategy between rounds, such as moments: named tensors, which a checkpoint can hold."""


@runtime_checkable
class Strategy(Protocol):
    """An aggregation strategy.

    A strategy takes a state and returns a state, and keeps none on itself. So a run can be saved and resumed.

    Three more members are optional. `broadcast` has the signature of the function `broadcast` below, without the
    strategy. The attribute `traits` is a `fedsplit.updates.Traits`. The method `stage()` returns a new
    `fedsplit.stages.GradientStage`, the strategy's half at one client for one round.

    Example:
        >>> from strategies.fedavg import FedAvg
        >>> isinstance(FedAvg(), Strategy)
        True
    """

    def init(self, adapters: Adapters) -> State:
        """Returns the state before the first round.

        Args:
            adapters: Initial adapters.
        """
        ...

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Aggregates the updates of a round.

        Args:
            state: State after the previous round.
            adapters: Adapters that the clients started the round from.
            updates: Updates in the order of the clients. All tensors are finite, and have the names and shapes of
                `adapters`. There is at least one update, unless the trait `idles` is set.

        Returns:
            The new state, and the adapters for the next round with the changes to fold into base weights.
        """
        ...


def traits_of(strategy: object) -> Traits:
    """Returns the traits of a strategy. A strategy without the attribute `traits` has the traits of plain averaging."""
    return getattr(strategy, "traits", Traits())


def broadcast(strategy: Strategy, state: State, adapters: Adapters, client: ClientInfo) -> Assignment | None:
    """Returns a client's assignment for a round: the result of the strategy's method `broadcast`, if it has one.

    Args:
        strategy: The strategy.
        state: State after the previous round.
        adapters: Adapters after the previous round.
        client: The client.

    Returns:
        By default the adapters, at the client's rank; None if the client does not train in the round.
    """
    method = getattr(strategy, "broadcast", None)
    if method is None:
        return Assignment(adapters.with_rank(client.rank))
    return method(state, adapters, client)


@runtime_checkable
class FlowerLike(Protocol):
    """Methods by which a Flower strategy is recognised without importing Flower."""

    def configure_train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `flwr.serverapp.strategy.Strategy`."""
        ...

    def aggregate_train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `flwr.serverapp.strategy.Strategy`."""
        ...


def is_builtin(strategy: object) -> bool:
    """Returns True for a strategy of the package `strategies`."""
    return type(strategy).__module__.partition(".")[0] == BUILTIN


def load_strategy(spec: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """Makes the strategy with a name.

    Args:
        spec: A name from the package `strategies`, `path/to/mine.py:Mine`, or `module:Class`.
        options: Keyword arguments from the user.
        defaults: Further keyword arguments. An argument is passed only if the class takes it and the user did not set
            it, such as the number of nodes that a Flower strategy waits for.

    Returns:
        A `Strategy`, or a strategy of Flower's.

    Raises:
        SettingError: There is no such class, or the class does not take the options.
    """
    made = make(STRATEGY, spec, options, defaults)
    if not isinstance(made, Strategy | FlowerLike):
        raise SettingError(
            "strategy", spec, "a class with the methods init and aggregate, or one of Flower's strategies"
        )
    return made


def _is_named(cls: type, spec: str) -> bool:
    """Returns True if a name stands for a class. Two loads of one file give two class objects, which count as equal."""
    found = find(STRATEGY, spec)
    return (found.__module__, found.__qualname__) == (cls.__module__, cls.__qualname__)


def aggregated_parts(config: Config) -> list[Kind]:
    """Returns the parts whose adapters a strategy aggregates."""
    has_copies = SCHEDULES[config.trunk.schedule].personal
    parts = []
    for part in PARTS:
        # Without copies all clients train one adapter of the trunk, and there is nothing to aggregate.
        is_aggregated = part != "trunk" or has_copies
        if part in config.share and is_aggregated:
            parts.append(part)
    return cast("list[Kind]", parts)


def coverage(config: Config, trained: Mapping[str, int]) -> str:
    """Returns a line on the share of the trained parameters that the strategy aggregates.

    Args:
        config: Configuration of the run.
        trained: Trained parameters by part.

    Example:
        >>> coverage(Config(), {"bottom": 10, "trunk": 60, "top": 30})
        'fedavg aggregates 40% of the trained parameters; all clients train the trunk'
    """
    seen = [part for part in aggregated_parts(config) if trained[part]]
    aggregated = sum(trained[part] for part in seen)
    total = sum(trained.values()) or 1  # a run may train nothing, to measure a model
    share = aggregated / total
    line = f"{config.strategy} aggregates {share:.0%} of the trained parameters"
    if trained["trunk"] and "trunk" not in seen:
        line += "; all clients train the trunk"
    return line


def check_strategy(strategy: object, config: Config) -> None:
    """Checks that a strategy can do what a run asks for.

    Raises:
        InputError: The strategy needs factors that the adapters do not have, cannot handle different ranks, needs more
            clients, cannot be applied in the run's type, or cannot go on. All errors are reported together.
    """
    traits = traits_of(strategy)
    check_all(
        _without_factors(traits, config),
        _wrong_restarts(traits, config),
        _wrong_ranks(traits, config),
        _too_few_clients(traits, config),
        _wrong_precision(traits, config),
        _wrong_evaluations(traits, config),
        _unnamed_stage(strategy, config),
        _lost_memory(strategy, config),
        _wrong_over_selection(strategy, config),
    )


def _wrong_over_selection(strategy: object, config: Config) -> Iterator[SettingError]:
    """Yields an error for over-selection with a strategy of Flower's, which samples the clients by itself."""
    if isinstance(strategy, FlowerLike) and config.network.over_select > 1:
        allowed = "1.0 with a strategy of Flower's, which samples the clients by itself"
        yield SettingError("network.over_select", config.network.over_select, allowed)


def _able(trait: str, value: bool) -> str:
    """Returns the names of the built-in strategies with a value of a trait, for messages."""
    able = []
    for name in sorted(builtin_package().STRATEGIES):
        traits = traits_of(find(STRATEGY, name))
        if getattr(traits, trait) is value:
            able.append(name)
    return ", ".join(able)


def _without_factors(traits: Traits, config: Config) -> Iterator[SettingError]:
    """Yields an error if the strategy computes with factors A and B, and the adapters have none."""
    has_prompts = config.prompt.kind != "off"
    if traits.factors and (has_prompts or not method_of(config.lora).factors):
        kind = f"--prompt.kind {config.prompt.kind}" if has_prompts else f"--peft {config.lora.method}"
        allowed = f"{_able('factors', False)} with {kind}, which has no pairs of factors A and B"
        yield SettingError("strategy", config.strategy, allowed)


def _wrong_restarts(traits: Traits, config: Config) -> Iterator[SettingError]:
    """Yields an error for adapters that do not start from fresh LoRA factors, if the strategy restarts every round."""
    if not traits.restarts:
        return
    if not draws_fresh(config.lora):
        allowed = "another one where training starts from other factors than LoRA's: this one starts every round afresh"
        yield SettingError("strategy", config.strategy, allowed)
    if config.init_adapter:
        allowed = f"none under a strategy that starts every round from fresh factors, as {config.strategy} does"
        yield SettingError("init_adapter", config.init_adapter, allowed)


def _wrong_ranks(traits: Traits, config: Config) -> Iterator[SettingError]:
    """Yields an error for different ranks, if the strategy needs equal ones."""
    if len(set(config.lora.rank)) > 1 and not traits.mixed_ranks:
        ranks = ",".join(map(str, config.lora.rank))
        allowed = f"one rank under the strategy {config.strategy}; {_able('mixed_ranks', True)} take several"
        yield SettingError("lora.rank", ranks, allowed)


def _too_few_clients(traits: Traits, config: Config) -> Iterator[SettingError]:
    """Yields an error if fewer clients train in a round than the strategy needs."""
    asked = config.sampled
    if asked < traits.fewest:
        shown = f"{asked} in a round" if asked < config.clients else asked
        allowed = f"{traits.fewest} and more in a round under the strategy {config.strategy} with its options"
        yield SettingError("clients", shown, allowed)


def _wrong_precision(traits: Traits, config: Config) -> Iterator[SettingError]:
    """Yields an error for base weights of few bits, if the strategy changes base weights."""
    if not traits.folds:
        return
    if config.dtype != "fp32":
        allowed = (
            f"fp32 under the strategy {config.strategy}, whose changes of base weights {config.dtype} would round away"
        )
        yield SettingError("dtype", config.dtype, allowed)
    quantized = [part for part in config.bits if part in aggregated_parts(config)]
    if quantized:
        allowed = f"none of {', '.join(quantized)} under the strategy {config.strategy}, which changes its base weights"
        yield SettingError("quantization", config.quantization, allowed)


def _wrong_evaluations(traits: Traits, config: Config) -> Iterator[SettingError]:
    """Yields an error if a client would miss an evaluation, with which changes of base weights reach the clients."""
    if not traits.folds:
        return
    allowed = f"1 under the strategy {config.strategy}: its changes of base weights reach clients with the evaluation"
    if config.eval.fraction != 1:
        yield SettingError("eval.fraction", config.eval.fraction, allowed)
    if config.eval.every != 1:
        yield SettingError("eval.every", config.eval.every, allowed)


def _unnamed_stage(strategy: object, config: Config) -> Iterator[SettingError]:
    """Yields an error if the strategy has a stage at the clients, and clients cannot load its class by the name."""
    if config.engine == "local":  # this process hands the object on
        return
    if callable(getattr(strategy, "stage", None)) and not _is_named(type(strategy), config.strategy):
        allowed = "the name of the strategy's class, by which clients load the stage that the strategy brings"
        yield SettingError("strategy", config.strategy, allowed)


def _lost_memory(strategy: object, config: Config) -> Iterator[SettingError]:
    """Yields an error if a run is to go on with a strategy whose memory was not saved."""
    if config.resume and isinstance(strategy, FlowerLike):
        yield SettingError("resume", config.resume, "a strategy whose memory can be saved; Flower's cannot")


@contextlib.contextmanager
def named(strategy: object, round: int) -> Iterator[None]:
    """Turns errors of a strategy, and attempts to end the program, into an error with file and line.

    Raises:
        FederationFailed: The code inside the context raised an error or called `sys.exit`.
    """
    try:
        yield
    except FederationFailed:
        raise  # it names its reason already
    except (Exception, SystemExit) as error:
        reason = f"the strategy {type(strategy).__name__} failed in round {round}: {described(error)}"
        raise FederationFailed(reason) from error
