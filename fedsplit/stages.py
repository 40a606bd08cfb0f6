"""Gradient stages: the work on a step's gradients between the backward and the optimiser.

A stage takes gradients and returns gradients. All stages of a party form one chain, in this order:

1. **Regularise**: AdaLoRA's pull towards orthogonal factors (`fedsplit.optimization.orthogonality`).
2. **Clip**: one norm over all parts of the model (`fedsplit.optimization.clipping`).
3. **Noise**: none yet. Noise belongs behind clipping, which bounds what it must hide.
4. **Terms of the strategy**: control variates, proximal term, decay (`fedsplit.optimization.terms`), in that order, and
   last the strategy's own stage (`fedsplit.optimization.own_stage`).

A client runs the whole chain. A copy of the trunk runs the same stages 1 and 4; its stage 2 is the coefficient that the
client sends. Terms are not clipped: they are no gradient of the client's data.

A strategy brings a stage of its own by a method `stage()` that returns a new one. The stage works at the clients, and
under `--trunk.schedule copies` at each client's copy of the trunk, too. At a client it may also add a term to the loss
itself, before the backward (`GradientStage.loss_term`). See docs/strategies.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor]
"""Gradients by the exported names of the adapter's tensors, such as `transformer.h.0.attn.c_attn.lora_A.weight`."""


GradientAt = Callable[[Mapping[str, Tensor]], Gradients]
"""Maps an adapter to the gradients of a step's loss there."""

StatesAt = Callable[[Mapping[str, Tensor]], Tensor]
"""Maps an adapter to the last hidden states (B, T, D) of some rows there."""

LossTerm = Callable[[Tensor], Tensor]
"""Maps the last hidden states (B, T, D) of some rows to a term of their loss, a scalar in the graph of the states."""


@dataclass(frozen=True)
class RoundStart:
    """State with which a party begins a round.

    Attributes:
        adapters: The adapter that training starts from, by exported name. Not to be changed.
        kept: The `Outcome.kept` of this party's last round that the server accepted; empty before the first.
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
    """The trunk's gradient of a step, which waits at the trunk for a coefficient.

    Attributes:
        squared_norm: Its squared norm, in float64.
        scale: Tells the trunk the coefficient. Must be called once.
    """

    squared_norm: float
    scale: Callable[[float], object]


@dataclass(frozen=True)
class LocalStep:
    """One step of a party's local training, behind its backward and before its optimiser.

    Attributes:
        parameters: The adapter before the optimiser's step, by exported name. Not to be changed.
        trunk: The trunk's gradient, where the clip stage decides on it; else None.
        gradient_at: Maps an adapter (of all names in `parameters`) to the gradients of this step's loss there, on the
            same rows, through the trunk as it is and without the stages' terms of the loss. Costs one more forward and
            backward, from which the trunk does not learn. None at the trunk.
    """

    parameters: Mapping[str, Tensor]
    trunk: TrunkShare | None = None
    gradient_at: GradientAt | None = None


@dataclass(frozen=True)
class Outcome:
    """What a stage leaves at the end of a round.

    Attributes:
        kept: State that stays with the party, by any names. It never crosses, and comes back as `RoundStart.kept`.
        sent: Tensors that go to the server beside the adapter, where a strategy finds them as `ClientUpdate.control`.
            One for each tensor that trains and is shared, of its name and shape; or none at all.
    """

    kept: Mapping[str, Tensor] = field(default_factory=dict)
    sent: Mapping[str, Tensor] = field(default_factory=dict)


class GradientStage:
    """A stage that changes nothing, to derive others from.

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
        """Takes the state of the round's beginning."""

    def loss_term(self, rows: Rows) -> LossTerm | None:
        """Returns a function that adds a term to the loss of some rows; None, the default, adds nothing.

        Called at clients alone, before the rows' forward. The term is added to the mean loss of the rows, and trains
        all parts as the loss does.

        Args:
            rows: The rows, and the way to their hidden states at other adapters.
        """
        return None

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Returns the gradients of a step as the next stage gets them.

        Args:
            gradients: By exported name. Not to be changed in place.
            step: The step.
        """
        return gradients

    def end(self, parameters: Mapping[str, Tensor]) -> Outcome:
        """Returns what the round leaves.

        Args:
            parameters: The adapter after the last step, by exported name.
        """
        return Outcome()

    def personalise(self, start: RoundStart) -> Mapping[str, Tensor]:
        """Returns the adapter of bottom and top with which a client measures its held-out text.

        By default that is the adapter which the client is given. Called at clients alone, on a new stage.

        Args:
            start: The adapter that the client is given, and the state that its stage kept.
        """
        return start.adapters


class Stages(GradientStage):
    """Several stages as one, each after the other, without recording operations for autograd.

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
        """Joins what the stages leave."""
        outcomes = [stage.end(parameters) for stage in self._stages]
        # Clones, since a stage may keep a parameter, which the next round overwrites.
        kept = {name: tensor.detach().clone() for outcome in outcomes for name, tensor in outcome.kept.items()}
        sent = {name: tensor for outcome in outcomes for name, tensor in outcome.sent.items()}
        return Outcome(kept, sent)


StageMaker = Callable[[], GradientStage]
"""Makes a new stage, for one party and one round."""
