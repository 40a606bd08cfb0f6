"""AdaLoRA's regulariser (2303.10512) as a gradient stage: it pulls factors P and Q towards orthogonality."""

from __future__ import annotations

from collections.abc import Collection

from fedsplit.adaptation.rank_allocation import regularisation
from fedsplit.adaptation.rank_budget import RankBudget
from fedsplit.stages import Gradients, GradientStage, LocalStep


class Orthogonality(GradientStage):
    """Adds the regulariser's gradient to the gradients of one part's factors.

    A factor without a gradient gets none.
    """

    def __init__(self, names: Collection[str], budget: RankBudget | None, share: float = 1.0) -> None:
        """Takes the part.

        Args:
            names: Exported names of the part's adapter.
            budget: The part's budget of ranks. None where ranks are not allocated: the stage changes nothing.
            share: Share of the regulariser to add, where a step comes in several parts.
        """
        self._names, self._budget, self._share = names, budget, share

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        """Adds the regulariser's gradient at the step's parameters."""
        if self._budget is None:
            return gradients
        reached = {name: step.parameters[name] for name in gradients if name in self._names}
        pulls = regularisation(reached, self._budget, self._share)
        return {**gradients, **{name: gradients[name] + pull for name, pull in pulls.items()}}
