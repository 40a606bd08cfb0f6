"""The contracts of objectives and metrics, tried on invented logits and labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.contracts.rules import BrokenError, Check, Trial, globals_changed_by, require_equal, tried
from fedsplit.demands import invented
from fedsplit.metrics.metric import Metric, asked_by
from fedsplit.model.kernels import IGNORED
from fedsplit.objectives.objective import Objective, cross_entropy, demands_of

ROWS = 4
"""Sequences of the trial: two pairs, for an objective over pairs."""

POSITIONS = 6
"""Predicted positions of a sequence."""

VOCABULARY = 11
"""Tokens of the trial's vocabulary."""


@dataclass(frozen=True)
class Batch:
    """Invented logits and labels, of which some are masked like a prompt or like padding.

    Attributes:
        logits: (B, T, V).
        labels: (B, T), -100 for positions without a prediction.
        further: The further arguments, by name.
    """

    logits: Tensor
    labels: Tensor
    further: Mapping[str, Tensor]

    @property
    def arguments(self) -> dict[str, Tensor]:
        """All arguments by name."""
        return {"logits": self.logits, "labels": self.labels, **self.further}

    def copy(self) -> Batch:
        """Returns a copy whose tensors are not shared; its logits have no graph."""
        further = {name: tensor.clone() for name, tensor in self.further.items()}
        return Batch(self.logits.detach().clone(), self.labels.clone(), further)

    def rows(self, rows: slice) -> Batch:
        """Returns some of the sequences."""
        further = {name: tensor[rows] for name, tensor in self.further.items()}
        return Batch(self.logits[rows], self.labels[rows], further)


def batch_of(further: frozenset[str]) -> Batch:
    """Returns a batch whose sequences have different numbers of labels.

    Args:
        further: Names of the further arguments.

    Example:
        >>> (batch_of(frozenset()).labels != -100).sum(1).tolist()
        [5, 3, 4, 2]
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, POSITIONS, VOCABULARY, generator=generator)
    labels = torch.randint(VOCABULARY, (ROWS, POSITIONS), generator=generator)
    labels[:, 0] = IGNORED  # like a prompt
    labels[1, 4:] = IGNORED  # like padding
    # Different numbers in both halves: otherwise a mean over labels and a mean over sequences would be equal.
    labels[2, 5:] = IGNORED
    labels[3, 3:] = IGNORED
    return Batch(logits, labels, invented(further, logits, labels, generator))


def check_objective(objective: Objective | None) -> list[Check]:
    """Puts an objective to its contract.

    Args:
        objective: An objective that `load_objective` returned; None for cross-entropy.
    """
    function = objective or cross_entropy
    demands = demands_of(objective)
    batch = batch_of(demands.further)

    def call(given: Batch) -> Tensor:
        return function(given.logits, given.labels, **given.further)

    def loss_and_gradient(given: Batch) -> tuple[Tensor, Tensor]:
        # A copy for each call, since the gradients of two calls would add up in one tensor.
        copy = given.copy()
        copy.logits.requires_grad_()
        loss = call(copy)
        loss.backward()
        if copy.logits.grad is None:
            raise BrokenError("the loss does not depend on the logits: they get no gradient from it")
        return loss.detach(), copy.logits.grad

    def usable() -> None:
        loss, _ = loss_and_gradient(batch)
        if loss.ndim or not math.isfinite(float(loss)) or float(loss) < 0:
            raise BrokenError(f"the loss is {loss}, not a scalar of 0 or more")

    def finite() -> None:
        _, gradient = loss_and_gradient(batch)
        if not torch.isfinite(gradient).all():
            raise BrokenError("the gradient is not finite")
        if not gradient.any():
            raise BrokenError("the gradient is zero everywhere")

    def again() -> None:
        results = []
        for _ in range(2):
            loss, gradient = loss_and_gradient(batch)
            results.append({"loss": loss, "gradient": gradient})
        first, second = results
        require_equal(second, first, "a second call gives another result")

    def masked() -> None:
        loss, gradient = loss_and_gradient(batch)
        if gradient[batch.labels == IGNORED].any():
            raise BrokenError("the gradient is not zero where labels are -100")
        other, _ = loss_and_gradient(_with_other_logits(batch))
        require_equal({"the loss": other}, {"the loss": loss}, "logits where labels are -100 count", exact=False)

    def mean() -> None:
        half = ROWS // 2
        parts = [batch.rows(slice(0, half)), batch.rows(slice(half, ROWS))]
        weights = [_weight(demands.mean_over, part.labels) for part in parts]
        losses = [float(call(part.copy()).detach()) for part in parts]
        weighted = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
        expected = sum(weighted) / sum(weights)
        found = float(call(batch.copy()).detach())
        rounding = _rounding([found, *losses])
        if not math.isclose(found, expected, rel_tol=rounding, abs_tol=1e-6):
            halves = f"its halves, weighted by {demands.mean_over}, {expected:.6g}"
            raise BrokenError(f"a batch has the loss {found:.6g}; {halves}")

    return tried(
        [
            ("loss", "The loss is a finite scalar of 0 or more.", usable),
            ("gradient", "The gradient is finite, and not zero everywhere.", finite),
            ("same result", "A second call gives the same loss and gradient to the bit.", again),
            ("masked positions", "Positions whose label is -100 do not matter.", masked),
            ("mean", f"The loss is a mean over {demands.mean_over}: halves of a batch add up.", mean),
            *_of_side_effects(batch, lambda given: call(given)),
        ]
    )


def check_metric(metric: Metric) -> list[Check]:
    """Puts a metric to its contract.

    Args:
        metric: A metric that `load_metrics` returned.
    """
    batch = batch_of(asked_by(metric))

    def call(given: Batch) -> tuple[float, float]:
        copy = given.copy()
        return metric(copy.logits, copy.labels, **copy.further)

    def counts() -> None:
        _, count = call(batch)
        if count == 0:
            raise BrokenError("nothing is counted in a batch of four sequences with labels")

    def again() -> None:
        first, second = call(batch), call(batch)
        if first != second:
            raise BrokenError(f"a second call gives {second}, the first {first}")

    def masked() -> None:
        first, other = call(batch), call(_with_other_logits(batch))
        if not _are_close(first, other):
            raise BrokenError(f"logits where labels are -100 count: {other} in place of {first}")

    def added() -> None:
        half = ROWS // 2
        parts = [call(batch.rows(rows)) for rows in (slice(0, half), slice(half, ROWS))]
        total, count = (sum(values) for values in zip(*parts, strict=True))
        found = call(batch)
        if not _are_close(found, (total, count)):
            raise BrokenError(f"a batch has sum and count {found}; its halves together {(total, count)}")

    def padded() -> None:
        first, other = call(batch), call(_wider(batch))
        if not _are_close(first, other):
            raise BrokenError(f"two further positions whose labels are -100 count: {other} in place of {first}")

    return tried(
        [
            ("sum and count", "A batch has a finite sum, and a count above 0.", counts),
            ("same result", "A second call gives the same sum and count.", again),
            ("masked positions", "Positions whose label is -100 do not matter.", masked),
            ("padding", "Further positions whose label is -100 change neither sum nor count.", padded),
            ("sums", "Sums and counts of two halves of a batch add up.", added),
            *_of_side_effects(batch, lambda given: metric(given.logits, given.labels, **given.further)),
        ]
    )


def _of_side_effects(batch: Batch, call: Callable[[Batch], Any]) -> list[Trial]:
    """Returns the checks that a function leaves everything else as it is."""

    def inputs() -> None:
        copy = batch.copy()
        call(copy)
        require_equal(copy.arguments, batch.arguments, "the call changed its argument")

    def rest() -> None:
        changed = globals_changed_by(lambda: call(batch.copy()))
        if "torch's random state" in changed:
            raise BrokenError("the call draws from torch's random state, and so changes the dropout of the run")
        if changed:
            raise BrokenError(f"the call changes {', '.join(changed)}")

    return [
        ("inputs", "The arguments are not changed in place.", inputs),
        ("side effects", "Random states and settings of torch stay as they are.", rest),
    ]


def _with_other_logits(batch: Batch) -> Batch:
    """Returns a batch with other logits where nothing is predicted."""
    copy = batch.copy()
    # Another seed than that of the batch, so that the logits differ.
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(copy.logits.shape, generator=generator)
    hidden = (copy.labels == IGNORED)[..., None]
    return Batch(torch.where(hidden, other, copy.logits), copy.labels, copy.further)


def _wider(batch: Batch) -> Batch:
    """Returns a batch with two further positions in which nothing is predicted, as of a longer sequence beside it."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(ROWS, 2, VOCABULARY, generator=generator)
    labels = torch.full((ROWS, 2), IGNORED)
    added = invented(frozenset(batch.further), logits, labels, generator)
    further = {}
    for name, tensor in batch.further.items():
        further[name] = torch.cat([tensor, added[name]], dim=1)
    wider_logits = torch.cat([batch.logits, logits], dim=1)
    wider_labels = torch.cat([batch.labels, labels], dim=1)
    return Batch(wider_logits, wider_labels, further)


def _rounding(losses: Sequence[float]) -> float:
    """Returns the relative difference that is rounding, by the coarsest type that holds all losses.

    A loss may be computed in a coarse type and returned in another, so that its own type says little.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if all(float(torch.tensor(loss).to(dtype)) == loss for loss in losses):
            return 2 * torch.finfo(dtype).eps
    return 1e-4


def _weight(mean_over: str, labels: Tensor) -> int:
    """Returns the weight of a batch's loss; labels are aligned with the logits, not shifted as in a step."""
    if mean_over == "labels":
        return int((labels != IGNORED).sum())
    return len(labels) // (2 if mean_over == "pairs" else 1)


def _are_close(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Returns True for sums and counts that are equal up to rounding."""
    pairs = zip(one, other, strict=True)
    return all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in pairs)
