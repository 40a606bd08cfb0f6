"""AdaLoRA's budget of ranks (2303.10512) as one part has it: how many, and from which of its steps on.

AdaLoRA deals one budget out over all layers of a model, by how much each rank matters to the loss. No party has all
layers, so each part deals out one of its own, over its own layers and by the gradients that it sees: `target_r` ranks
a layer on average, so that the parts' budgets are in proportion to their numbers of layers. That differs from the whole
model's where ranks would have moved from one part to another.

Needs no library, so that it can be asked before any is loaded; `fedsplit.adaptation.rank_allocation` does the dealing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsplit.adaptation.methods import method_of, options_of
from fedsplit.allowed import Allowed, SettingError
from fedsplit.config import Config, LoraSettings


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_COUNT = Allowed("a whole number of at least 1", lambda v: _is_whole(v, 1))
_STEPS = Allowed("a whole number of at least 0", lambda v: _is_whole(v, 0))
_SHARE = Allowed("a number above 0 and below 1", lambda v: _is_number(v) and 0 < v < 1)

FIELDS: Mapping[str, Allowed] = {
    "init_r": _COUNT,
    "target_r": _COUNT,
    "tinit": _STEPS,
    "tfinal": _STEPS,
    "deltaT": _COUNT,
    "beta1": _SHARE,
    "beta2": _SHARE,
    "orth_reg_weight": Allowed("a number of at least 0", lambda v: _is_number(v) and v >= 0),
}
"""What of PEFT's configuration `--peft-config` may say of a budget."""

_START = Allowed("true | false", lambda v: isinstance(v, bool))
"""Of `init_lora_weights`, of which PEFT's AdaLoRA heeds no other value."""


@dataclass(frozen=True)
class RankBudget:
    """The budget of one part, with PEFT's defaults.

    A part's clock goes by the round, as the learning rate's does: step s of round r is number (r - 1) * steps + s of
    rounds * steps, from 1, whatever was lost in rounds before. At step total - tfinal the last ranks are dealt out.

    Attributes:
        init_r: The rank that every layer begins with.
        target_r: The mean rank that is left at the end.
        tinit: Steps before the budget begins to fall.
        tfinal: Steps after the last allocation.
        deltaT: Steps between two allocations.
        beta1: How slowly the mean of the importance moves.
        beta2: How slowly its uncertainty moves.
        orth_reg_weight: What the regularisation counts that keeps P and Q orthogonal.
        steps: Steps that the part's optimiser makes in a round in which none is lost.
        rounds: Rounds of the run.
        layers: Adapted layers of the whole model; the regularisation is a mean over these.
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
        """Steps of all rounds."""
        return self.rounds * self.steps

    @property
    def last(self) -> int:
        """The step at which ranks are dealt out for the last time."""
        return self.total - self.tfinal

    @property
    def fields(self) -> dict[str, Any]:
        """As PEFT's configuration has it."""
        return {name: getattr(self, name) for name in FIELDS} | {"total_step": self.total}

    def position(self, round: int, step: int) -> int:
        """The number of a step of the part's optimiser among all.

        Args:
            round: The round, from 1.
            step: The step within it, from 1; one more than were to be expected counts as the last of them.
        """
        return (round - 1) * self.steps + min(step, self.steps)

    def stretched(self, steps: int) -> RankBudget:
        """The same course over another number of steps a round: what comes before and after falls together."""
        tinit, tfinal = (count * steps // self.steps for count in (self.tinit, self.tfinal))
        return dataclasses.replace(self, tinit=tinit, tfinal=tfinal, steps=steps)


def trunk_steps(config: Config) -> int:
    """How many steps the trunk's optimiser makes in a round: a copy as many as its client."""
    steps, trunk = config.train.steps, config.trunk
    if trunk.schedule == "shared":  # one for each step of each client
        return config.sampled * steps
    if trunk.schedule == "accumulate":  # one at each barrier
        return -(-steps // trunk.every) if trunk.every else 1
    return steps


def budget_of(config: Config, kind: str, layers: int) -> RankBudget | None:
    """The budget of a part; None where ranks are not dealt out.

    Args:
        config: The run's.
        kind: "bottom", "trunk" or "top".
        layers: Adapted layers of the whole model.
    """
    if config.prompt.kind != "off" or not method_of(config.lora).allocates:
        return None
    given = {name: value for name, value in options_of(config.lora).items() if name in FIELDS}
    budget = RankBudget(**given, steps=config.train.steps, rounds=config.rounds, layers=layers)
    return budget.stretched(trunk_steps(config)) if kind == "trunk" else budget


def for_file(config: Config) -> LoraSettings:
    """The settings of adapters as their file tells them: with a client's steps, where PEFT writes steps down."""
    if not method_of(config.lora).allocates:
        return config.lora
    total = {"total_step": config.rounds * config.train.steps}
    return dataclasses.replace(config.lora, options=json.dumps(options_of(config.lora) | total))


def check_budget(config: Config) -> None:
    """Makes sure that ranks can be dealt out as a run's settings ask.

    Raises:
        SettingError: They cannot, or a field has no meaning for it.
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
    budget = budget_of(config, "bottom", 1)
    assert budget is not None
    if budget.target_r >= budget.init_r:
        words = f"1 to {budget.init_r - 1}, below init_r" if budget.init_r > 1 else "none below init_r 1: raise that"
        raise SettingError("lora.options", f"target_r {budget.target_r}", f"{words}, so that ranks can be taken away")
    if budget.tinit >= budget.last:
        words = f"less than {budget.total} in all, a client's steps in all rounds, so that the budget can fall"
        raise SettingError("lora.options", f"tinit {budget.tinit} and tfinal {budget.tfinal}", words)
