"""A strategy's own gradient stage: loaded by the strategy's name at every party, and checked at every call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsplit.loading import STRATEGY, described, find, make
from fedsplit.optimization.bounds import is_bounded
from fedsplit.settings.config import Config
from fedsplit.stages import Gradients, GradientStage, LocalStep, LossTerm, Outcome, RoundStart, Rows, StageMaker


class StageFailed(Exception):
    """A strategy's own stage raised an error, or returned an unusable value. The message names both."""


def own_defaults(config: Config) -> dict[str, Any]:
    """Returns the keyword arguments that a strategy of ours is given where its class takes them."""
    return {"seed": config.seed, "clients": config.clients}


def stage_maker(config: Config, strategy: Any = None) -> StageMaker | None:
    """Returns a function that makes the strategy's own stage, for one party and one round.

    Clients and the trunk load the strategy themselves, since code does not cross.

    Args:
        config: Configuration of the run.
        strategy: The strategy as an object; None: the one that the configuration names.

    Returns:
        The function; None where the strategy has no method `stage`.

    Example:
        >>> stage_maker(Config(strategy="fedavg")) is None
        True
    """
    if strategy is None:
        found = find(STRATEGY, config.strategy)
        if not callable(getattr(found, "stage", None)):
            return None
        strategy = make(STRATEGY, config.strategy, config.strategy_options, own_defaults(config))
    elif not callable(getattr(strategy, "stage", None)):
        return None
    return lambda: OwnStage(strategy, config.strategy)


class OwnStage(GradientStage):
    """The stage that a strategy makes, with each result checked."""

    def __init__(self, strategy: Any, name: str) -> None:
        """Makes the stage.

        Args:
            strategy: The strategy, with a method `stage`.
            name: The strategy's name, for messages.

        Raises:
            StageFailed: The strategy made no stage.
        """
        self._name = name
        with self._named("made"):
            self._stage: Any = strategy.stage()
        if not isinstance(self._stage, GradientStage):
            raise self._failed(f"is a {type(self._stage).__name__}, not a fedsplit.stages.GradientStage")

    def begin(self, start: RoundStart) -> None:
        """Begins the round."""
        with self._named("failed at the round's begin"):
            self._stage.begin(start)

    def loss_term(self, rows: Rows) -> LossTerm | None:
        """Returns the stage's term of the loss, each value of which is checked."""
        with self._named("failed to make a term of the loss"):
            term: Any = self._stage.loss_term(rows)
        if term is None:
            return None
        if not callable(term):
            raise self._failed(f"made a {type(term).__name__} as its term of the loss, not a function or None")
        return functools.partial(self._checked_term, term)

    def _checked_term(self, term: LossTerm, states: Tensor) -> Tensor:
        """Returns a term of the loss, if it can be added to the loss."""
        with self._named("failed in its term of the loss"):
            value: Any = term(states)
        if not isinstance(value, Tensor):
            raise self._failed(f"returned a {type(value).__name__} as its term of the loss, not a tensor")
        if value.ndim or not value.is_floating_point():
            words = f"a tensor of {value.dtype} with the shape {tuple(value.shape)}"
            raise self._failed(f"returned {words} as its term of the loss, not a scalar of floating-point type")
        if states.requires_grad and not value.requires_grad:
            raise self._failed("returned a term of the loss without a gradient: it does not depend on the states")
        # NaN for states that are not finite is no fault of the stage: training has diverged.
        if not bool(torch.isfinite(value.detach())) and bool(torch.isfinite(states.detach()).all()):
            raise self._failed(f"returned {float(value.detach()):g} as its term of the loss")
        return value

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Returns the stage's gradients, if they can take the place of those it was given."""
        with self._named("failed in a step"):
            found: Any = self._stage(gradients, step)
        self._check_names(found, gradients, "gradients")
        if not is_bounded(*found.values()) and is_bounded(*gradients.values()):
            raise self._failed("returned gradients that are NaN, infinite or too large to be squared")
        # The fused optimiser pairs elements by their place in memory.
        return {name: found[name].contiguous() for name in gradients}

    def end(self, parameters: Mapping[str, Tensor]) -> Outcome:
        """Returns what the stage leaves, if it can be kept and sent."""
        with self._named("failed at the round's end"):
            outcome: Any = self._stage.end(parameters)
        if not isinstance(outcome, Outcome):
            raise self._failed(f"ended with a {type(outcome).__name__}, not a fedsplit.stages.Outcome")
        if outcome.sent:
            sent = {name: tensor for name, tensor in parameters.items() if name in outcome.sent}
            self._check_names(outcome.sent, sent, "tensors to send")
        for name, value in outcome.kept.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise self._failed(f"keeps {name} as a {type(value).__name__}, not as a tensor")
            if not bool(torch.isfinite(value).all()):
                raise self._failed(f"keeps NaN or infinite values in {name}")
        return outcome

    def personalise(self, start: RoundStart) -> Mapping[str, Tensor]:
        """Returns the adapter to measure with, if it fits."""
        with self._named("failed to personalise an adapter"):
            found: Any = self._stage.personalise(start)
        self._check_names(found, start.adapters, "a personal adapter")
        return found

    def _check_names(self, found: Any, expected: Mapping[str, Tensor], what: str) -> None:
        """Makes sure that tensors have the names and shapes of others.

        Raises:
            StageFailed: They have not.
        """
        if not isinstance(found, Mapping) or found.keys() != expected.keys():
            raise self._failed(f"returned {what} of other names than it was given")
        for name, tensor in expected.items():
            if not isinstance(found[name], Tensor) or found[name].shape != tensor.shape:
                got = tuple(found[name].shape) if isinstance(found[name], Tensor) else type(found[name]).__name__
                raise self._failed(f"returned {what} with {name} as {got}, not with the shape {tuple(tensor.shape)}")

    def _failed(self, words: str) -> StageFailed:
        return StageFailed(f"the stage of the strategy {self._name} {words}")

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Names the strategy in an error of its code. A refused step or a lost trunk is no such error."""
        try:
            yield
        except Exception as error:
            if type(error).__module__.partition(".")[0] == "fedsplit":
                raise
            raise self._failed(f"{what}: {described(error)}") from error
