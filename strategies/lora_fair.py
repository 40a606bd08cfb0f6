"""LoRA-FAIR (2411.14961).

Rule: A <- Abar, B <- Bbar + DeltaB, where DeltaB makes the product of the new factors close to the mean of the
products: it minimises ||Delta W* / s - (Bbar + DeltaB) Abar||^2 + lambda ||DeltaB||^2, which is
DeltaB = (Delta W* / s - Bbar Abar) Abar^T (Abar Abar^T + lambda I)^-1. Here lambda is `ridge` times the mean of Abar's
squared row norms, trace(Abar Abar^T) / r, so that it has no unit. The default of 1e-4 lets ||DeltaB|| grow to 50 times
what is missing over a row's length where rows of Abar are nearly dependent, and changes little elsewhere. The paper
measures closeness by the cosine of the two matrices and takes gradient steps; with the squared distance the minimum
has this closed form.
Needs: nothing; ranks may differ, by filling with zeros to the largest (the paper has equal ranks), where rows of A
that no client of a round held stay as they were and serve the correction like the others. Costs: both factors up and
down once a round; an r x r system a layer. Not exact: the part of Delta W* outside of Abar's row space is lost.
Delta W* Abar^T is computed from the clients' factors, never from a dense matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.lowrank import LowRank
from fedsplit.updates import Adapters, ClientUpdate, Traits, counted, mean_change
from strategies.mixed_ranks import average_others, padded_average


def correction(missing: LowRank, a: Tensor, ridge: float) -> Tensor:
    """The DeltaB (out, r) that brings DeltaB @ A near a matrix.

    Args:
        missing: The matrix (out, in).
        a: The factor A (r, in), in float64.
        ridge: What ||DeltaB||^2 weighs beside the squared distance, as a part of A's mean squared row norm.
    """
    gram = a @ a.T
    mean = float(gram.trace()) / a.shape[0]
    if mean == 0:
        return missing.up.new_zeros(missing.shape[0], a.shape[0])
    regular = gram + ridge * mean * torch.eye(a.shape[0], dtype=a.dtype)
    return torch.linalg.solve(regular, missing.up @ (missing.down @ a.T), left=False)


class LoRAFAIR:
    """The average of the factors, with a correction to B for what the averages' product misses."""

    traits = Traits(mixed_ranks=True, factors=True)

    def __init__(self, ridge: float = 1e-4) -> None:
        """Sets the correction's size.

        Args:
            ridge: The penalty on the correction, as a part of the mean squared row norm of the averaged A.

        Raises:
            ValueError: ridge is not above 0.
        """
        if not 0 < ridge < math.inf:
            raise ValueError(f"ridge must be above 0, not {ridge}")
        self._ridge = ridge

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """LoRA-FAIR remembers nothing."""
        return {}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Averages the factors, filled with zeros, and corrects B.

        Raises:
            ValueError: No client has any example.
        """
        updates, shares = counted(updates)
        factors = {}
        for layer, (a, b) in padded_average(adapters, updates, shares).items():
            wanted = mean_change(updates, shares, layer).times(1 / adapters.scaling(layer))
            factors[layer] = a, b + correction(wanted - LowRank(b, a), a, self._ridge)
        return state, average_others(adapters, updates, shares).with_factors(factors)
