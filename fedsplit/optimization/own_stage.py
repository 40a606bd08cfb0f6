"""A gradient stage of a strategy: loaded by the strategy's name at every party, and checked at every call."""

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
    """The stage of a strategy raised an error, or returned an unusable value. The message names strategy and fault."""


def own_defaults(config: Config) -> dict[str, Any]:
    """Returns keyword arguments for strategies with parameters of these names.

    Example:
        >>> own_defaults(Config(clients=4))["clients"]
        4
    """
    return {"seed": config.seed, "clients": config.clients}


def stage_maker(config: Config, strategy: Any = None) -> StageMaker | None:
    """Returns a function that makes the strategy's stage, for one party and one round.

    Every party loads the strategy by name, since code does not cross.

    Args:
        config: Configuration of the run.
        strategy: The strategy as an object; None for the strategy named in the configuration.

    Returns:
        The function; None for a strategy without a method `stage`.

    Example:
        >>> stage_maker(Config(strategy="fedavg")) is None
        True
    """
    # Asked of the class, since to make a strategy without a stage would be in vain at every party.
    kind_or_object = find(STRATEGY, config.strategy) if strategy is None else strategy
    if not callable(getattr(kind_or_object, "stage", None)):
        return None
    if strategy is None:
        strategy = make(STRATEGY, config.strategy, config.strategy_options, own_defaults(config))
    return lambda: OwnStage(strategy, config.strategy)


class OwnStage(GradientStage):
    """The stage of a strategy, with a check of each result."""

    def __init__(self, strategy: Any, name: str) -> None:
        """Makes the stage.

        Args:
            strategy: The strategy, with a method `stage`.
            name: Name of the strategy, for messages.

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
        """Returns the stage's term of the loss, with a check of each value."""
        with self._named("failed to make a term of the loss"):
            term: Any = self._stage.loss_term(rows)
        if term is None:
            return None
        if not callable(term):
            raise self._failed(f"made a {type(term).__name__} as its term of the loss, not a function or None")
        return functools.partial(self._checked_term, term)

    def _checked_term(self, term: LossTerm, states: Tensor) -> Tensor:
        """Returns the value of a term, if the value can be added to the loss.

        Raises:
            StageFailed: The term failed, or returned no finite scalar with a gradient.
        """
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
        is_finite = bool(torch.isfinite(value.detach()))
        if not is_finite and bool(torch.isfinite(states.detach()).all()):
            raise self._failed(f"returned {float(value.detach()):g} as its term of the loss")
        return value

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Returns the stage's gradients, if the optimiser can use the gradients."""
        with self._named("failed in a step"):
            returned: Any = self._stage(gradients, step)
        self._check_names(returned, gradients, "gradients")
        if not is_bounded(*returned.values()) and is_bounded(*gradients.values()):
            raise self._failed("returned gradients that are NaN, infinite or too large to be squared")
        # The fused optimiser pairs elements by the place in memory: a transposed gradient would be scrambled.
        return {name: returned[name].contiguous() for name in gradients}

    def end(self, parameters: Mapping[str, Tensor]) -> Outcome:
        """Returns the outcome of the stage, if the tensors can be kept and sent."""
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
        """Returns the adapter for an evaluation, if names and shapes fit."""
        with self._named("failed to personalise an adapter"):
            returned: Any = self._stage.personalise(start)
        self._check_names(returned, start.adapters, "a personal adapter")
        return returned

    def _check_names(self, returned: Any, expected: Mapping[str, Tensor], what: str) -> None:
        """Checks that returned tensors have the expected names and shapes.

        Args:
            returned: Result of the stage.
            expected: Tensors with the names and shapes.
            what: Name of the result, for the message.

        Raises:
            StageFailed: A name or a shape differs.
        """
        if not isinstance(returned, Mapping) or returned.keys() != expected.keys():
            raise self._failed(f"returned {what} of other names than it was given")
        for name, tensor in expected.items():
            value = returned[name]
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                continue
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise self._failed(f"returned {what} with {name} as {got}, not with the shape {tuple(tensor.shape)}")

    def _failed(self, words: str) -> StageFailed:
        return StageFailed(f"the stage of the strategy {self._name} {words}")

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Names the strategy in an error of the strategy's code."""
        try:
            yield
        except (Exception, SystemExit) as error:  # the user's code may call `sys.exit`
            # A stage may ask for gradients elsewhere. A refused step or a lost trunk is no fault of the strategy.
            if type(error).__module__.partition(".")[0] == "fedsplit":
                raise
            raise self._failed(f"{what}: {described(error)}") from error
