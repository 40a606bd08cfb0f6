"""Objectives: functions of the top's logits and the labels that give the loss which training minimises.

Shapes: B sequences of T predicted positions, V tokens in the vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.errors import SettingError
from fedsplit.loading import OWN, Kind, described, make
from fedsplit.model.kernels import IGNORED

CROSS_ENTROPY = "cross_entropy"
"""Name of the default."""

OBJECTIVES = {
    CROSS_ENTROPY: "fedsplit.objectives.objective:cross_entropy",
    "label_smoothing": "fedsplit.objectives.label_smoothing:LabelSmoothing",
}
"""The names that `--objective` takes, and where the classes are."""

OBJECTIVE = Kind("objective", lambda: OBJECTIVES, f"{' | '.join(sorted(OBJECTIVES))}, {OWN}", functions=True)
"""Objectives, for `--objective`."""


class Objective(Protocol):
    """The loss of a batch.

    Logits and labels are aligned: the logits at a position predict the label at the same position. The loss is the mean
    over all labels that are not -100, a scalar of 0 or more in the graph of the logits. Where a step consists of
    several batches or micro-batches, its loss is their mean, weighted by their numbers of such labels.
    """

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of a batch.

        Args:
            logits: (B, T, V) in float32; of a classifier (B, C).
            labels: Tokens (B, T), -100 where nothing is predicted (a prompt, padding, a virtual token); of a classifier
                classes (B,).
        """
        ...


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean negative log-likelihood, in nats. The default; by itself it runs as a fused kernel.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [9.0, 0.0]]])
        >>> float(cross_entropy(logits, torch.tensor([[1, -100]])))  # ln 2
        0.6931471824645996
    """
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


class ObjectiveFailed(Exception):
    """An objective raised an error, or returned no usable loss. The message names the objective and the reason."""


class _Checked:
    """A user's objective, each result of which is checked."""

    def __init__(self, name: str, objective: Objective) -> None:
        self._name, self._objective = name, objective

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss.

        Raises:
            ObjectiveFailed: The objective raised an error, or returned no scalar of 0 or more in the logits' graph.
        """
        try:
            loss: Any = self._objective(logits, labels)
        except Exception as error:
            raise ObjectiveFailed(f"the objective {self._name} failed: {described(error)}") from error
        if fault := _fault_of(loss, logits):
            raise ObjectiveFailed(f"the objective {self._name} returned {fault}")
        return loss


def _fault_of(loss: Any, logits: Tensor) -> str:
    """Returns in words what is wrong with a loss; nothing where it is right."""
    if not isinstance(loss, Tensor):
        return f"a {type(loss).__name__}, not a tensor"
    if loss.ndim or not loss.is_floating_point():
        return f"a tensor of {loss.dtype} with the shape {tuple(loss.shape)}, not a scalar of floating-point type"
    if logits.requires_grad and not loss.requires_grad:
        return "a loss without a gradient: it does not depend on the logits, or was detached from them"
    value = float(loss.detach())
    # NaN for logits that are not finite is no fault of the objective: training has diverged.
    if not 0 <= value < float("inf") and bool(torch.isfinite(logits.detach()).all()):
        return f"{value:g}, not a number of 0 or more"
    return ""


def load_objective(
    spec: str, options: Mapping[str, Any], defaults: Mapping[str, Any], given: Any = None
) -> Objective | None:
    """Makes the objective that a name stands for.

    Args:
        spec: One of `OBJECTIVES`, `path/to/mine.py:Mine`, or `module:Class`. A function is taken as it is.
        options: Keyword arguments that the user gave.
        defaults: Keyword arguments to pass where the class takes them.
        given: The objective as an object, whose name is `spec`; None: it is made by its name.

    Returns:
        The objective. None for cross-entropy, which the top computes by itself.

    Raises:
        SettingError: There is no such objective, or it does not take the options.

    Example:
        >>> load_objective("label_smoothing", {"smoothing": 0.2}, {}).smoothing
        0.2
    """
    made = make(OBJECTIVE, spec, options, defaults) if given is None else given
    if made is cross_entropy:
        return None
    if not callable(made):
        raise SettingError("objective", spec, "a function of logits and labels, or a class with a method __call__")
    return made if spec in OBJECTIVES else _Checked(spec, made)


def try_objective(objective: Objective | None, spec: str, outputs: int, classifies: bool) -> None:
    """Calls an objective once on invented logits, so that its mistakes show before a run begins.

    Args:
        objective: The objective; cross-entropy, as None, is not tried.
        spec: Its name.
        outputs: Tokens of the vocabulary, or classes.
        classifies: The labels are classes of sequences.

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
        labels[0, :1] = labels[1, 3:] = IGNORED  # as a prompt, and as padding
    try:
        loss = objective(logits, labels)
        loss.backward()
    except ObjectiveFailed as error:
        raise SettingError("objective", spec, f"an objective that works ({error}, on a trial)") from error
    except RuntimeError as error:
        words = f"an objective with a gradient ({described(error)}, on a trial)"
        raise SettingError("objective", spec, words) from error
    if logits.grad is None or not bool(torch.isfinite(logits.grad).all()):
        raise SettingError("objective", spec, "an objective whose gradient is finite (it was not, on a trial)")
