"""What an aggregation strategy is, and how a name becomes one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from torch import Tensor

from fedsplit.adaptation.methods import draws_fresh, method_of
from fedsplit.errors import SettingError
from fedsplit.federation.clients import FederationFailed
from fedsplit.loading import BUILTIN, STRATEGY, builtin_package, described, find, make
from fedsplit.settings.choices import PARTS
from fedsplit.settings.config import Config
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, Traits

if TYPE_CHECKING:
    from fedsplit.model.parts import Kind

State = Mapping[str, Tensor]
"""What a strategy remembers from round to round, such as moments: named tensors, so that it can be saved."""


@runtime_checkable
class Strategy(Protocol):
    """State in, state out: a strategy keeps nothing on itself, so it can be saved, resumed and tested.

    Three more members are optional. `broadcast` has the signature of the function `broadcast` below, without the
    strategy. The attribute `traits` is a `fedsplit.updates.Traits`. The method `stage()` returns a new
    `fedsplit.stages.GradientStage`, the strategy's half at one client for one round.

    Example:
        >>> from strategies.fedavg import FedAvg
        >>> isinstance(FedAvg(), Strategy)
        True
    """

    def init(self, adapters: Adapters) -> State:
        """The state before the first round, given the adapters that training starts from."""
        ...

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """One round's aggregation.

        Args:
            state: The state after the round before.
            adapters: The adapters that the clients started this round from.
            updates: What they returned, in the order of the clients; all finite and of the adapters' names and
                shapes. At least one, unless the strategy's traits say that it idles.

        Returns:
            The new state, and the adapters that the next round starts from; with what is to be folded into
            base weights.
        """
        ...


def traits_of(strategy: object) -> Traits:
    """A strategy's traits; of one that names none, those of plain averaging by whatever rule."""
    return getattr(strategy, "traits", Traits())


def broadcast(strategy: Strategy, state: State, adapters: Adapters, client: ClientInfo) -> Assignment | None:
    """What a client begins a round with.

    Args:
        strategy: Its `broadcast(state, adapters, client)` is asked, where it has one.
        state: The state after the round before.
        adapters: The adapters after the round before.
        client: Who asks.

    Returns:
        By default the adapters, at the client's rank; None if the client is to rest in this round.
    """
    own = getattr(strategy, "broadcast", None)
    return own(state, adapters, client) if own else Assignment(adapters.with_rank(client.rank))


@runtime_checkable
class FlowerLike(Protocol):
    """What tells a Flower strategy apart, without importing Flower."""

    def configure_train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `flwr.serverapp.strategy.Strategy`."""
        ...

    def aggregate_train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `flwr.serverapp.strategy.Strategy`."""
        ...


def is_builtin(strategy: object) -> bool:
    """Whether a strategy is one of the package `strategies`."""
    return type(strategy).__module__.partition(".")[0] == BUILTIN


def load_strategy(spec: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """Makes the strategy that a specification names.

    Args:
        spec: A name from the package `strategies`, `path/to/mine.py:Mine`, or `module:Class`.
        options: Keyword arguments the user gave.
        defaults: Keyword arguments to pass where the class takes them and the user did not give them; such
            as how many nodes a Flower strategy waits for.

    Returns:
        A `Strategy`, or whatever else the class makes, such as a Flower strategy.

    Raises:
        SettingError: It is not there, or does not take the options.
    """
    made = make(STRATEGY, spec, options, defaults)
    if not isinstance(made, Strategy | FlowerLike):
        raise SettingError(
            "strategy", spec, "a class with the methods init and aggregate, or one of Flower's strategies"
        )
    return made


def _is_named(cls: type, spec: str) -> bool:
    """Returns whether a name stands for a class. A file that is loaded twice makes two classes, which are the same."""
    found = find(STRATEGY, spec)
    return (found.__module__, found.__qualname__) == (cls.__module__, cls.__qualname__)


def aggregated_parts(config: Config) -> list[Kind]:
    """The parts whose adapters a strategy sees."""
    personal = SCHEDULES[config.trunk.schedule].personal
    found = [part for part in PARTS if part in config.share and (part != "trunk" or personal)]
    return cast("list[Kind]", found)


def coverage(config: Config, trained: Mapping[str, int]) -> str:
    """Says what share of the trained parameters the strategy aggregates, and what becomes of the others.

    Args:
        config: The run's.
        trained: Trained parameters by part.

    Example:
        >>> coverage(Config(), {"bottom": 10, "trunk": 60, "top": 30})
        'fedavg aggregates 40% of the trained parameters; all clients train the trunk'
    """
    seen = [part for part in aggregated_parts(config) if trained[part]]
    share = sum(trained[part] for part in seen) / (sum(trained.values()) or 1)
    line = f"{config.strategy} aggregates {share:.0%} of the trained parameters"
    if trained["trunk"] and "trunk" not in seen:
        line += "; all clients train the trunk"
    return line


def check_strategy(strategy: Any, config: Config) -> None:
    """Makes sure that a strategy can do what a run asks of it.

    Raises:
        SettingError: It needs factors that the adapters do not have, cannot handle different ranks, cannot be applied
            in this type, or cannot go on.
    """
    traits = traits_of(strategy)
    package: Any = builtin_package()
    if traits.factors and (config.prompt.kind != "off" or not method_of(config.lora).factors):
        can = sorted(name for name in package.STRATEGIES if not traits_of(find(STRATEGY, name)).factors)
        kind = f"--prompt.kind {config.prompt.kind}" if config.prompt.kind != "off" else f"--peft {config.lora.method}"
        words = f"{', '.join(can)} with {kind}, which has no pairs of factors A and B"
        raise SettingError("strategy", config.strategy, words)
    if traits.restarts and not draws_fresh(config.lora):
        words = "another one where training starts from other factors than LoRA's: this one starts every round afresh"
        raise SettingError("strategy", config.strategy, words)
    if traits.restarts and config.init_adapter:
        words = "none under a strategy that starts every round from fresh factors"
        raise SettingError("init_adapter", config.init_adapter, f"{words}, as {config.strategy} does")
    if len(set(config.lora.rank)) > 1 and not traits.mixed_ranks:
        can = sorted(name for name in package.STRATEGIES if traits_of(find(STRATEGY, name)).mixed_ranks)
        ranks = ",".join(map(str, config.lora.rank))
        raise SettingError(
            "lora.rank", ranks, f"one rank under the strategy {config.strategy}; {', '.join(can)} take several"
        )
    asked = config.sampled
    if asked < traits.fewest:
        words = f"{traits.fewest} and more in a round under the strategy {config.strategy} with its options"
        raise SettingError("clients", f"{asked} in a round" if asked < config.clients else asked, words)
    if traits.folds and config.dtype != "fp32":
        words = (
            f"fp32 under the strategy {config.strategy}, whose changes of base weights {config.dtype} would round away"
        )
        raise SettingError("dtype", config.dtype, words)
    if traits.folds and (quantized := [part for part in config.bits if part in aggregated_parts(config)]):
        words = f"none of {', '.join(quantized)} under the strategy {config.strategy}, which changes its base weights"
        raise SettingError("quantization", config.quantization, words)
    if traits.folds:
        words = f"1 under the strategy {config.strategy}: its changes of base weights reach clients with the evaluation"
        if config.eval.fraction != 1:
            raise SettingError("eval.fraction", config.eval.fraction, words)
        if config.eval.every != 1:
            raise SettingError("eval.every", config.eval.every, words)
    by_name = config.engine != "local"  # the engine in this process hands the object on
    if by_name and callable(getattr(strategy, "stage", None)) and not _is_named(type(strategy), config.strategy):
        words = "the name of the strategy's class, by which clients load the stage that the strategy brings"
        raise SettingError("strategy", config.strategy, words)
    if config.resume and isinstance(strategy, FlowerLike):
        raise SettingError("resume", config.resume, "a strategy whose memory can be saved; Flower's cannot")


@contextlib.contextmanager
def named(strategy: object, round: int) -> Iterator[None]:
    """Names the strategy, the file and the line where a strategy raises an error or would end the program.

    Raises:
        FederationFailed: The strategy did.
    """
    try:
        yield
    except FederationFailed:
        raise
    except (Exception, SystemExit) as error:
        reason = f"the strategy {type(strategy).__name__} failed in round {round}: {described(error)}"
        raise FederationFailed(reason) from error
