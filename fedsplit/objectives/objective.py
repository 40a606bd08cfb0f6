"""Objectives: losses for training, as functions of the top's logits and the labels.

An objective may ask for further arguments by its signature (`fedsplit.demands`), and say what its loss is a mean over.

Shapes: B sequences of T predicted positions, V tokens in the vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.corpora.sequences import predicted
from fedsplit.demands import REFERENCE, further_of, invented
from fedsplit.errors import SettingError
from fedsplit.loading import OWN, Kind, described, make
from fedsplit.model.kernels import IGNORED

CROSS_ENTROPY = "cross_entropy"
"""Name of the default objective."""

OBJECTIVES = {
    CROSS_ENTROPY: "fedsplit.objectives.objective:cross_entropy",
    "dpo": "fedsplit.objectives.dpo:DPO",
    "distillation": "fedsplit.objectives.distillation:Distillation",
    "label_smoothing": "fedsplit.objectives.label_smoothing:LabelSmoothing",
}
"""Modules and classes of objectives, by the names for `--objective`."""

OBJECTIVE = Kind("objective", lambda: OBJECTIVES, f"{' | '.join(sorted(OBJECTIVES))}, {OWN}", functions=True)
"""Objectives, for `--objective`."""


class Objective(Protocol):
    """The loss of a batch.

    Logits and labels are aligned: the logits at a position predict the label at the same position. The loss is the mean
    over all labels except -100, a scalar of 0 or more in the graph of the logits. The loss of a step with several
    batches or micro-batches is the mean of their losses, weighted by the numbers of labels except -100.

    An objective whose loss is another mean says so by an attribute `mean_over`, a name in `MEANS`. The losses of
    batches are then weighted by the numbers of sequences or of pairs. An objective over pairs needs the data format
    `preference`: rows 0, 2, 4, … are chosen texts, and each next row is the rejected one of the pair. A pair is never
    divided.

    Parameters called `mask` and `reference` get further arguments, by name.

    Example:
        >>> class Focal:  # focal loss (1708.02002): confident predictions count less
        ...     def __call__(self, logits, labels):
        ...         nats = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        ...         weighted = (1 - torch.exp(-nats)) ** 2 * nats
        ...         return weighted[labels.flatten() != -100].mean()
        >>> round(float(Focal()(torch.zeros(1, 1, 2), torch.tensor([[0]]))), 4)  # ln 2 / 4
        0.1733
    """

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the loss of a batch.

        Args:
            logits: (B, T, V) in float32; (B, C) for a classifier.
            labels: Tokens (B, T), -100 for positions without a prediction (a prompt, padding, a virtual token); classes
                (B,) for a classifier.
            *args: Nothing.
            **kwargs: The further arguments that the signature asks for: `mask` (B, T), False where the label stands on
                padding; `reference` (B, T, V), the base model's logits in float32, without gradient.
        """
        ...


MEANS = ("labels", "sequences", "pairs")
"""Possible values of an objective's attribute `mean_over`."""


@dataclass(frozen=True)
class Demands:
    """What an objective asks of the party that calls it.

    Attributes:
        further: Names of the further arguments.
        mean_over: What the loss is a mean over, a name in `MEANS`.
    """

    further: frozenset[str] = frozenset()
    mean_over: str = "labels"

    @property
    def compares(self) -> bool:
        """True if the objective needs the base model's logits."""
        return REFERENCE in self.further

    @property
    def rows(self) -> int:
        """Number of sequences that may not be divided."""
        return 2 if self.mean_over == "pairs" else 1

    def weight(self, labels: Tensor) -> int:
        """Returns the number of things that the loss of some sequences is a mean over.

        Args:
            labels: Token labels (B, T) that are not shifted, or classes (B,).

        Example:
            >>> labels = torch.tensor([[5, 6, 7], [5, 6, IGNORED]])
            >>> [Demands(mean_over=name).weight(labels) for name in MEANS]
            [3, 2, 1]
        """
        if self.mean_over == "labels":
            return predicted(labels)
        return len(labels) // self.rows


def demands_of(objective: Objective | None, spec: str = "") -> Demands:
    """Returns what an objective asks for.

    Args:
        objective: The objective; None for cross-entropy.
        spec: Name of the objective, for messages.

    Raises:
        SettingError: The objective needs something that a split cannot give, or a mean that does not exist.

    Example:
        >>> demands_of(None).mean_over
        'labels'
    """
    if objective is None:
        return Demands()
    # The signature of the check says nothing about what the user's function asks for.
    if isinstance(objective, _Checked):
        return objective.demands
    mean_over = getattr(objective, "mean_over", "labels")
    if mean_over not in MEANS:
        needed = f"an objective whose mean_over is {' | '.join(MEANS)} (it is {mean_over!r})"
        raise SettingError("objective", spec, needed)
    return Demands(further_of(objective, "objective", spec), mean_over)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean negative log-likelihood in nats. The default objective.

    A run with this objective computes the same loss by a fused kernel, `fedsplit.model.kernels.causal_loss`.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [9.0, 0.0]]])
        >>> float(cross_entropy(logits, torch.tensor([[1, -100]])))  # ln 2
        0.6931471824645996
    """
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


class ObjectiveFailed(Exception):
    """An objective raised an error, or returned no usable loss. The message names the objective and the reason."""


class _Checked:
    """A user's objective, with a check of each result.

    Attributes:
        demands: What the objective asks for.
    """

    def __init__(self, name: str, objective: Objective, demands: Demands) -> None:
        """Takes the objective, a name for messages, and what the objective asks for."""
        self._name = name
        self._objective = objective
        self.demands = demands

    def __call__(self, logits: Tensor, labels: Tensor, /, **further: Tensor) -> Tensor:
        """Returns the loss.

        Raises:
            ObjectiveFailed: The objective raised an error, or returned no scalar of 0 or more in the logits' graph.
        """
        try:
            loss: Any = self._objective(logits, labels, **further)
        except (Exception, SystemExit) as error:
            raise ObjectiveFailed(f"the objective {self._name} failed: {described(error)}") from error
        fault = _fault_of(loss, logits)
        if fault:
            raise ObjectiveFailed(f"the objective {self._name} returned {fault}")
        return loss


def _fault_of(loss: Any, logits: Tensor) -> str:
    """Returns the fault of a loss in words, or an empty text for a usable loss."""
    if not isinstance(loss, Tensor):
        return f"a {type(loss).__name__}, not a tensor"
    if loss.ndim or not loss.is_floating_point():
        return f"a tensor of {loss.dtype} with the shape {tuple(loss.shape)}, not a scalar of floating-point type"
    if logits.requires_grad and not loss.requires_grad:
        return "a loss without a gradient: it does not depend on the logits, or was detached from them"
    value = float(loss.detach())
    is_usable = 0 <= value < float("inf")
    # NaN for logits that are not finite is no fault of the objective: training has diverged.
    if not is_usable and bool(torch.isfinite(logits.detach()).all()):
        return f"{value:g}, not a number of 0 or more"
    return ""


def load_objective(
    spec: str,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    given: Any = None,
) -> Objective | None:
    """Makes an objective by name.

    Args:
        spec: Name of the objective: a key of `OBJECTIVES`, `path/to/mine.py:Mine`, or `module:Class`. A function is
            used directly, and a class is called.
        options: Keyword arguments from the user.
        defaults: Keyword arguments for a class with parameters of these names.
        given: The objective as an object; None to make the objective by name.

    Returns:
        The objective. None for cross-entropy, since the top has a fused kernel for cross-entropy.

    Raises:
        SettingError: The objective does not exist, does not take the options, or needs something that a split cannot
            give.

    Example:
        >>> load_objective("label_smoothing", {"smoothing": 0.2}, {}).smoothing
        0.2
    """
    made = make(OBJECTIVE, spec, options, defaults) if given is None else given
    if made is cross_entropy:
        return None
    if not callable(made):
        raise SettingError("objective", spec, "a function of logits and labels, or a class with a method __call__")
    demands = demands_of(made, spec)
    # The checks read values off the GPU at each step.
    return made if spec in OBJECTIVES else _Checked(spec, made, demands)


def try_objective(objective: Objective | None, spec: str, outputs: int, classifies: bool) -> None:
    """Calls an objective once on invented logits, so that mistakes show before a run begins.

    Args:
        objective: The objective; None for cross-entropy, which needs no trial.
        spec: Name of the objective, for messages.
        outputs: Number of tokens in the vocabulary, or number of classes.
        classifies: True if labels are classes of sequences.

    Raises:
        SettingError: The objective failed, or its gradient is not finite.
    """
    if objective is None:
        return
    generator = torch.Generator().manual_seed(0)
    shape = (2, outputs) if classifies else (2, 4, outputs)
    logits = torch.randn(shape, generator=generator).requires_grad_()
    labels = torch.randint(outputs, shape[:-1], generator=generator)
    if not classifies:
        labels[0, :1] = IGNORED  # like a prompt
        labels[1, 3:] = IGNORED  # like padding
    further = invented(demands_of(objective).further, logits, labels, generator)
    try:
        loss = objective(logits, labels, **further)
        loss.backward()
    except ObjectiveFailed as error:
        raise SettingError("objective", spec, f"an objective that works ({error}, on a trial)") from error
    except RuntimeError as error:
        words = f"an objective with a gradient ({described(error)}, on a trial)"
        raise SettingError("objective", spec, words) from error
    if logits.grad is None or not bool(torch.isfinite(logits.grad).all()):
        raise SettingError("objective", spec, "an objective whose gradient is finite (it was not, on a trial)")
