"""AdaLoRA's regulariser (2303.10512) as a gradient stage. The regulariser pulls P and Q towards orthogonality."""

from __future__ import annotations

from collections.abc import Collection

from fedsplit.adaptation.rank_allocation import regularisation
from fedsplit.adaptation.rank_budget import RankBudget
from fedsplit.stages import Gradients, GradientStage, LocalStep


class Orthogonality(GradientStage):
    """Adds the regulariser's gradient to the gradients of one part's factors.

    A factor without a gradient stays without a gradient.
    """

    def __init__(self, names: Collection[str], budget: RankBudget | None, share: float = 1.0) -> None:
        """Takes the part.

        Args:
            names: Exported names of the part's adapter.
            budget: Budget of the part's ranks; None for fixed ranks. With fixed ranks, the stage changes nothing.
            share: Share of the regulariser to add, for a step in several parts.
        """
        self._names = names
        self._budget = budget
        self._share = share

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Adds the regulariser's gradient at the step's parameters."""
        if self._budget is None:
            return gradients
        reached = {name: step.parameters[name] for name in gradients if name in self._names}
        regularised = dict(gradients)
        for name, pull in regularisation(reached, self._budget, self._share).items():
            regularised[name] = regularised[name] + pull
        return regularised
