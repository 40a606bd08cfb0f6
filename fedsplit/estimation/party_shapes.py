"""The parties of a run without weights: bottom, stages of the trunk, and top, with their adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.adaptation.run_adapters import outlined
from fedsplit.client.measures import load_objective_of
from fedsplit.engines.planning import plan
from fedsplit.errors import SettingError, one_line
from fedsplit.estimation.tracing import Trace, trace
from fedsplit.model.devices import TYPES
from fedsplit.model.facts import Facts, read_facts
from fedsplit.model.parts import Kind
from fedsplit.model.sources import config_folder
from fedsplit.objectives.objective import Demands, demands_of
from fedsplit.settings.choices import PAIRS
from fedsplit.settings.config import Config
from fedsplit.trunk.schedules import SCHEDULES, Schedule
from fedsplit.trunk.spans import Span, spans_of
from fedsplit.updates import Adapters, Layer


@dataclass(frozen=True)
class Workload:
    """Facts about the data of a client, which an estimate assumes.

    Attributes:
        sequences: Training sequences of each client.
        held_out: Held-out sequences of each client.
        classes: Number of classes of texts; 0 for a language model.
    """

    sequences: int = 0
    held_out: int = 0
    classes: int = 0


class Parties:
    """Parts with adapters, on the meta device, and the facts that decide about bytes and memory.

    Attributes:
        config: Settings of the run, with the open ones decided as `simulate` decides them.
        workload: Facts about the data.
        facts: Facts about the model.
        bottom: First blocks.
        stages: Blocks of each stage of the trunk.
        spans: Span of each stage.
        top: Last blocks and the head.
        demands: What the objective asks for.

    Example:
        >>> parties = Parties(Config(cut="2:5"))
        >>> len(parties.adapters(["bottom"]).tensors), parties.wants_gradient  # two factors of four projections
        (16, True)
    """

    def __init__(self, config: Config, workload: Workload | None = None) -> None:
        """Builds the parts.

        Args:
            config: Settings of the run, checked.
            workload: Facts about the data; None for a client with as many held-out sequences as are measured.

        Raises:
            InputError: The model or a setting is wrong.
        """
        self.workload = workload or Workload()
        self.facts: Facts = read_facts(config_folder(config.model, weights=False))
        self.config = decided(config, self.facts)
        self.demands: Demands = demands_of(load_objective_of(self.config))
        self.spans: list[Span] = spans_of(self.config)
        classes = self.workload.classes
        self.bottom: Any = outlined(self.config, "bottom", classes)
        self.stages: list[Any] = [outlined(span.config(self.config), "trunk", classes) for span in self.spans]
        self.top: Any = outlined(self.config, "top", classes)
        self._traces: dict[tuple[str, int], Trace] = {}

    @property
    def schedule(self) -> Schedule:
        """Schedule of the trunk."""
        return SCHEDULES[self.config.trunk.schedule]

    @property
    def coefficient(self) -> float:
        """Coefficient of the loss that balances a mixture of experts; 0 for no such loss."""
        return self.config.router_aux_loss

    @property
    def positions(self) -> int:
        """Positions of a sequence on the wire: virtual tokens and text."""
        return int(self.bottom.virtual) + self.config.train.max_length

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of a batch."""
        train = self.config.train
        # A pair of texts is not divided, so that a batch of pairs has fewer parts.
        return max(1, min(train.micro_batches, train.batch_size // self.demands.rows))

    @property
    def rows_of_micro_batch(self) -> int:
        """Number of sequences of the largest micro-batch."""
        examples = self.config.train.batch_size // self.demands.rows
        return -(-examples // self.micro_batches) * self.demands.rows

    @property
    def wants_gradient(self) -> bool:
        """True if the hidden states of the bottom need a gradient: an adapter lies below them."""
        return self.schedule.returns_gradient and any(p.requires_grad for p in self.bottom.parameters())

    @property
    def trunk_learns(self) -> bool:
        """True if the trunk has adapters that train."""
        return self.schedule.learns and any(self.stage_learns(number) for number in range(len(self.stages)))

    def stage_learns(self, number: int) -> bool:
        """Returns True if a stage of the trunk has adapters that train."""
        return self.schedule.learns and any(p.requires_grad for p in self.stages[number].parameters())

    def parts(self, kind: Kind) -> list[Any]:
        """Returns the parts of a kind: one, or the stages of the trunk."""
        return self.stages if kind == "trunk" else [getattr(self, kind)]

    def adapters(self, kinds: Sequence[Kind]) -> Adapters:
        """Returns the adapters of parts of some kinds, on the meta device."""
        tensors: dict[str, Tensor] = {}
        layers: dict[str, Layer] = {}
        for kind in kinds:
            for part in self.parts(kind):
                tensors |= {name: parameter.detach().to("meta") for name, parameter in lora.parameters(part).items()}
                layers |= lora.layers_of(part)
        return Adapters(tensors, layers)

    def trace(self, kind: Kind, rows: int, stage: int = 0) -> Trace:
        """Returns the memory of a step of a part.

        Args:
            kind: The part.
            rows: Sequences that are computed together.
            stage: Number of the trunk's stage.

        Raises:
            SettingError: The sizes in config.json do not fit each other.
        """
        key = (f"{kind}{stage}", rows)
        if key not in self._traces:
            needs = self.wants_gradient or (stage > 0 and self.trunk_learns)
            if kind == "top":
                needs = self.schedule.expects_backward(self.wants_gradient)
            dtype = self._dtype_below(kind, stage)
            part = self.parts(kind)[stage]
            length = self.config.train.max_length
            try:
                found = trace(part, rows, length, dtype, kind != "bottom" and needs, self.workload.classes)
            except RuntimeError as error:  # from torch, for matrices that cannot be multiplied
                words = f"{self.config.model} (the {kind} cannot compute a step: {one_line(error)})"
                raise SettingError("model", words, "a config.json whose sizes fit each other") from None
            self._traces[key] = found
        return self._traces[key]

    def _dtype_below(self, kind: Kind, stage: int) -> torch.dtype:
        """Returns the type of the hidden states that reach a part."""
        if kind == "bottom":
            return TYPES[self.config.dtype]
        if kind == "trunk":
            return self.dtype_behind(stage - 1)
        return self.dtype_behind(len(self.stages) - 1)

    def dtype_behind(self, stage: int) -> torch.dtype:
        """Returns the type of the hidden states behind a stage of the trunk; behind the bottom for stage -1.

        The type is wider than the type of computation where float32 adapters lie in the path of the hidden states.
        """
        if self.config.dtype == "fp32":
            return torch.float32
        rows = self.rows_of_micro_batch  # as for the memory, so that no part is played twice
        return self.trace("bottom", rows).dtype if stage < 0 else self.trace("trunk", rows, stage).dtype


def decided(config: Config, facts: Facts) -> Config:
    """Returns settings with values for the ones that a user may leave open, as `simulate` decides them.

    Args:
        config: Settings of a run.
        facts: Facts about the model.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> config = Config(engine="local", objective="dpo")
        >>> done = decided(config, read_facts(BUNDLED_MODEL))
        >>> done.train.micro_batches, done.data.format
        (1, 'preference')
    """
    config = replace(config, router_aux_loss=facts.coefficient(config.router_aux_loss))
    if demands_of(load_objective_of(config)).mean_over == "pairs":
        config = replace(config, data=replace(config.data, format=PAIRS))
    micro_batches = plan(config, facts.width).micro_batches
    return replace(config, train=replace(config.train, micro_batches=micro_batches))
