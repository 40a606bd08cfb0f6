"""Gradient stages: functions of a step's gradients that run between the backward and the optimiser.

All stages of a party form a chain, in this order:

1. **Regularise**: AdaLoRA's pull towards orthogonal factors (`fedsplit.optimization.orthogonality`).
2. **Clip**: one norm over all parts of the model (`fedsplit.optimization.clipping`).
3. **Noise**: none yet. Noise belongs behind clipping, since its size depends on the bound of the norm.
4. **Terms of the strategy**: control variates, proximal term, decay (`fedsplit.optimization.terms`), in this order, and
   last the strategy's gradient stage (`fedsplit.optimization.own_stage`).

A client runs the whole chain. A client's copy of the trunk runs stages 1 and 4; for stage 2 the client sends the
clipping coefficient. Terms are not clipped, since they are no gradients of the client's data.

A strategy adds a gradient stage by a method `stage()` that returns a new stage. The stage works at the clients, and
under `--trunk.schedule copies` at each client's copy of the trunk, too. At a client a stage may also add a term to the
loss, before the backward (`GradientStage.loss_term`). See docs/strategies.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor]
"""Gradients by the exported names of the adapter's tensors, such as `transformer.h.0.attn.c_attn.lora_A.weight`."""


GradientAt = Callable[[Mapping[str, Tensor]], Gradients]
"""Maps an adapter, by exported name, to the gradients of a step's loss at the adapter."""

StatesAt = Callable[[Mapping[str, Tensor]], Tensor]
"""Maps an adapter to the last hidden states (B, T, D) of some rows there."""

LossTerm = Callable[[Tensor], Tensor]
"""Maps the last hidden states (B, T, D) of some rows to a term of their loss, a scalar in the graph of the states."""


@dataclass(frozen=True)
class RoundStart:
    """State with which a party begins a round.

    Attributes:
        adapters: The adapter that training starts from, by exported name. Not to be changed.
        kept: `Outcome.kept` of the party's last round that the server accepted; empty before the first such round.

    Example:
        >>> start = RoundStart(adapters={"w": torch.zeros(2)})
        >>> start.kept
        {}
    """

    adapters: Mapping[str, Tensor]
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """Rows of a client's step before their forward: one micro-batch.

    Last hidden states are the input of the head: the top's output behind the final norm.

    Attributes:
        ids: Tokens (B, T).
        labels: Tokens (B, T), -100 where nothing is predicted; of a classifier, classes (B,).
        mask: (B, T), 0 on padding; None where there is none. With virtual tokens, labels and mask are as long as the
            hidden states, in which virtual tokens come first.
        states_at: Maps an adapter of bottom and top (of the names in `RoundStart.adapters`) to the last hidden states
            (B, T, D) of these rows there, through the trunk as it is, without dropout and without a graph. Costs one
            more forward.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor | None
    states_at: StatesAt


@dataclass(frozen=True)
class TrunkShare:
    """The trunk's share of a gradient. The trunk holds the gradient until it gets the clipping coefficient.

    Attributes:
        squared_norm: Squared norm of the trunk's gradient, in float64.
        scale: Sends the coefficient to the trunk. Must be called once.
    """

    squared_norm: float
    scale: Callable[[float], object]


@dataclass(frozen=True)
class LocalStep:
    """A step of a party's local training, after the backward and before the optimiser.

    Attributes:
        parameters: The adapter before the optimiser's step, by exported name. Not to be changed.
        trunk: The trunk's share of the gradient, if the client clips; else None.
        gradient_at: Maps an adapter with all names of `parameters` to the gradients of the step's loss at the adapter,
            for the step's rows and without the stages' terms of the loss. Costs a forward and a backward through all
            parts; the trunk does not learn from them. None at the trunk.
    """

    parameters: Mapping[str, Tensor]
    trunk: TrunkShare | None = None
    gradient_at: GradientAt | None = None


@dataclass(frozen=True)
class Outcome:
    """Result of a stage at the end of a round.

    Attributes:
        kept: State that stays with the party, by any names. In the next round the stage finds it as `RoundStart.kept`.
        sent: Tensors for the server, which the strategy finds as `ClientUpdate.control`. Either a tensor for every
            tensor that trains and is shared, with equal names and shapes, or no tensor at all.
    """

    kept: Mapping[str, Tensor] = field(default_factory=dict)
    sent: Mapping[str, Tensor] = field(default_factory=dict)


class GradientStage:
    """Base class of stages. Its methods change nothing.

    A stage serves one party for one round: `begin`, one call a step, `end`. At a client, `loss_term` comes before the
    call, once for each micro-batch of the step.

    Example:
        >>> class Halve(GradientStage):
        ...     def __call__(self, gradients, step):
        ...         return {name: gradient / 2 for name, gradient in gradients.items()}
        >>> weight = {"w": torch.zeros(2)}
        >>> Halve()({"w": torch.tensor([2.0, 4.0])}, LocalStep(weight))
        {'w': tensor([1., 2.])}
    """

    def begin(self, start: RoundStart) -> None:
        """Begins a round.

        Args:
            start: The adapter, and the state that the stage kept.
        """

    def loss_term(self, rows: Rows) -> LossTerm | None:
        """Returns a function that adds a term to the loss of some rows; None, the default, adds nothing.

        Called at clients alone, before the rows' forward. The term is added to the mean loss of the rows, and trains
        all parts as the loss does.

        Args:
            rows: The rows, and the way to their hidden states at other adapters.
        """
        return None

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Returns the gradients of a step for the next stage.

        Args:
            gradients: Gradients by exported name. Not to be changed in place.
            step: The step.
        """
        return gradients

    def end(self, parameters: Mapping[str, Tensor]) -> Outcome:
        """Ends the round, and returns its result.

        Args:
            parameters: The adapter after the last step, by exported name.
        """
        return Outcome()

    def personalise(self, start: RoundStart) -> Mapping[str, Tensor]:
        """Returns the adapter of bottom and top with which a client measures its held-out text.

        By default the client's adapter is measured unchanged. Only clients call this method, on a new stage.

        Args:
            start: The client's adapter, and the state that its stage kept.
        """
        return start.adapters


class Stages(GradientStage):
    """A chain of stages. Each stage gets the gradients of the stage before, and autograd records nothing.

    Example:
        >>> class Add(GradientStage):
        ...     def __init__(self, number):
        ...         self.number = number
        ...     def __call__(self, gradients, step):
        ...         return {name: gradient + self.number for name, gradient in gradients.items()}
        >>> Stages(Add(1), Add(10))({"w": torch.zeros(1)}, LocalStep({"w": torch.zeros(1)}))
        {'w': tensor([11.])}
    """

    def __init__(self, *stages: GradientStage) -> None:
        """Takes the stages in their order."""
        self._stages = stages

    def begin(self, start: RoundStart) -> None:
        """Begins each stage."""
        for stage in self._stages:
            stage.begin(start)

    def loss_term(self, rows: Rows) -> LossTerm | None:
        """Returns the sum of the stages' terms; None where no stage has any."""
        made = [stage.loss_term(rows) for stage in self._stages]
        terms = [term for term in made if term is not None]
        if not terms:
            return None
        return lambda states: torch.stack([term(states) for term in terms]).sum()

    @torch.no_grad()
    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Hands the gradients from stage to stage."""
        for stage in self._stages:
            gradients = stage(gradients, step)
        return gradients

    @torch.no_grad()
    def end(self, parameters: Mapping[str, Tensor]) -> Outcome:
        """Joins the results of the stages."""
        kept: dict[str, Tensor] = {}
        sent: dict[str, Tensor] = {}
        for stage in self._stages:
            outcome = stage.end(parameters)
            # Cloned, since a stage may keep a parameter itself, which the next round overwrites.
            kept |= {name: tensor.detach().clone() for name, tensor in outcome.kept.items()}
            sent |= outcome.sent
        return Outcome(kept, sent)


StageMaker = Callable[[], GradientStage]
"""Makes a new stage, for one party and one round."""
