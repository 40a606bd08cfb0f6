"""Rank budget of one part under AdaLoRA (2303.10512): the number of ranks, and the schedule of their reallocation.

AdaLoRA distributes one budget of ranks over all layers of a model, by the importance of each rank to the loss. No
party has all layers. So each part distributes a budget over the part's layers, by the gradients of the part:
`target_r` ranks a layer on average. The result differs from AdaLoRA on the unsplit model if ranks would have moved
between parts.

This module needs no library, so that settings can be checked before any library is loaded.
`fedsplit.adaptation.rank_allocation` allocates the ranks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsplit.adaptation.methods import method_of, options_of
from fedsplit.errors import SettingError
from fedsplit.settings.config import Config
from fedsplit.settings.sections import LoraSettings
from fedsplit.settings.validators import Validator


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_COUNT = Validator("a whole number of at least 1", lambda v: _is_whole(v, 1))
_STEPS = Validator("a whole number of at least 0", lambda v: _is_whole(v, 0))
_SHARE = Validator("a number above 0 and below 1", lambda v: _is_number(v) and 0 < v < 1)

FIELDS: Mapping[str, Validator] = {
    "init_r": _COUNT,
    "target_r": _COUNT,
    "tinit": _STEPS,
    "tfinal": _STEPS,
    "deltaT": _COUNT,
    "beta1": _SHARE,
    "beta2": _SHARE,
    "orth_reg_weight": Validator("a number of at least 0", lambda v: _is_number(v) and v >= 0),
}
"""Fields of PEFT's configuration that `lora.options` may set for a budget."""

_START = Validator("true | false", lambda v: isinstance(v, bool))
"""Values of `init_lora_weights`. PEFT's AdaLoRA ignores any further value."""


@dataclass(frozen=True)
class RankBudget:
    """Rank budget of one part, with PEFT's defaults.

    Steps are numbered by round, as for the learning rate: step s of round r has the number (r - 1) * steps + s, from
    1, also if steps of earlier rounds were lost. The last allocation is at step total - tfinal.

    Attributes:
        init_r: Rank of every layer at the beginning.
        target_r: Mean rank of a layer at the end.
        tinit: Number of steps before the budget begins to fall.
        tfinal: Number of steps after the last allocation.
        deltaT: Number of steps between two allocations.
        beta1: Decay of the moving average of the importance.
        beta2: Decay of the moving average of the uncertainty of the importance.
        orth_reg_weight: Weight of the regularisation that keeps P and Q orthogonal.
        steps: Number of steps of the part's optimiser in a round without losses.
        rounds: Number of rounds of the run.
        layers: Number of adapted layers of the unsplit model. The regularisation is a mean over these.

    Example:
        >>> budget = RankBudget(steps=10, rounds=3, tfinal=5)
        >>> budget.total, budget.last, budget.position(round=2, step=1)
        (30, 25, 11)
    """

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    steps: int = 1
    rounds: int = 1
    layers: int = 1

    @property
    def total(self) -> int:
        """Number of steps of all rounds."""
        return self.rounds * self.steps

    @property
    def last(self) -> int:
        """Number of the step with the last allocation."""
        return self.total - self.tfinal

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of PEFT's configuration."""
        return {name: getattr(self, name) for name in FIELDS} | {"total_step": self.total}

    def position(self, round: int, step: int) -> int:
        """Returns the number of a step of the part's optimiser.

        Args:
            round: Number of the round, from 1.
            step: Number of the step in the round, from 1. Steps beyond the expected number count as the last one.
        """
        return (round - 1) * self.steps + min(step, self.steps)

    def stretched(self, steps: int) -> RankBudget:
        """Returns the schedule over a new number of steps a round, with the phases at the former times."""
        # Rounded down alike, so that a phase never becomes longer than all steps.
        tinit = self.tinit * steps // self.steps
        tfinal = self.tfinal * steps // self.steps
        return dataclasses.replace(self, tinit=tinit, tfinal=tfinal, steps=steps)


def trunk_steps(config: Config) -> int:
    """Returns the number of steps of the trunk's optimiser in a round. A client's copy makes the client's steps.

    Example:
        >>> trunk_steps(Config(clients=8)) == 8 * Config().train.steps  # schedule `shared`
        True
    """
    steps = config.train.steps
    trunk = config.trunk
    if trunk.schedule == "shared":  # one step for each step of each client
        return config.sampled * steps
    if trunk.schedule == "accumulate":  # one step at each barrier
        return -(-steps // trunk.every) if trunk.every else 1  # rounded up: a round ends with a barrier
    return steps


def budget_of(config: Config, kind: str, layers: int) -> RankBudget | None:
    """Returns the rank budget of a part; None if the run's adapters do not reallocate ranks.

    Args:
        config: Settings of the run.
        kind: "bottom", "trunk" or "top".
        layers: Number of adapted layers of the unsplit model.

    Example:
        >>> config = Config(lora=LoraSettings(method="adalora", options='{"target_r": 4}'))
        >>> budget_of(config, "bottom", layers=24).target_r
        4
    """
    if config.prompt.kind != "off" or not method_of(config.lora).allocates:
        return None
    # The others, such as `init_lora_weights`, go to PEFT as they are.
    options = {name: value for name, value in options_of(config.lora).items() if name in FIELDS}
    budget = RankBudget(
        **options,
        steps=config.train.steps,
        rounds=config.rounds,
        layers=layers,
    )
    return budget.stretched(trunk_steps(config)) if kind == "trunk" else budget


def for_file(config: Config) -> LoraSettings:
    """Returns the adapter settings to write to an adapter's file. AdaLoRA's include the steps of a client."""
    if not method_of(config.lora).allocates:
        return config.lora
    total = {"total_step": config.rounds * config.train.steps}
    options = options_of(config.lora) | total
    return dataclasses.replace(config.lora, options=json.dumps(options))


def check_budget(config: Config) -> None:
    """Checks the settings of a run that reallocates ranks.

    Raises:
        SettingError: A field has an impossible value or no meaning for AdaLoRA, or the budget cannot fall.
    """
    if not method_of(config.lora).allocates:
        return
    name = config.lora.method
    for field, value in options_of(config.lora).items():
        allowed = _START if field == "init_lora_weights" else FIELDS.get(field)
        if allowed is None:
            raise SettingError("lora.options", field, f"{' | '.join(FIELDS)} | init_lora_weights with {name}")
        if not allowed.test(value):
            raise SettingError("lora.options", f"{field} {json.dumps(value)}", f"{allowed.words} with {name}")
    if config.train.epochs:
        words = f"0 with {name}, whose schedule needs a number of steps that no party's data decide (train.steps)"
        raise SettingError("train.epochs", config.train.epochs, words)

    budget = budget_of(config, "bottom", layers=1)  # the number of layers does not matter to the schedule
    assert budget is not None
    if budget.target_r >= budget.init_r:
        possible = f"1 to {budget.init_r - 1}, below init_r" if budget.init_r > 1 else "none below init_r 1: raise that"
        words = f"{possible}, so that ranks can be taken away"
        raise SettingError("lora.options", f"target_r {budget.target_r}", words)
    if budget.tinit >= budget.last:
        words = f"less than {budget.total} in all, a client's steps in all rounds, so that the budget can fall"
        raise SettingError("lora.options", f"tinit {budget.tinit} and tfinal {budget.tfinal}", words)
