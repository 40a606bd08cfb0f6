"""LoRA-FAIR (2411.14961): average the factors, then correct B towards the mean of the products.

Rule:
    A <- Abar
    B <- Bbar + DeltaB
    DeltaB = (Delta W* / s - Bbar Abar) Abar^T (Abar Abar^T + lambda I)^-1
Delta W* = sum_i w_i s_i B_i A_i is the mean of the products. DeltaB minimises
||Delta W* / s - (Bbar + DeltaB) Abar||^2 + lambda ||DeltaB||^2.

lambda is `ridge` times trace(Abar Abar^T) / r, the mean of Abar's squared row norms, so that `ridge` has no unit. The
default of 1e-4 lets ||DeltaB|| grow to 50 times the missing part over the length of a row if rows of Abar are nearly
dependent, and changes little elsewhere. The paper measures closeness by the cosine of the two matrices and takes
gradient steps; the squared distance has this closed form.

Needs: nothing; ranks may differ by padding with zeros (the paper has equal ranks). Rows of A that no client of a round
held keep their values and serve the correction like all rows.
Costs: both factors up and down once a round; a system (r x r) a layer. Delta W* Abar^T comes from the clients' factors,
never from a dense matrix.
Not exact: the part of Delta W* outside of Abar's row space is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedsplit.lowrank import LowRank
from fedsplit.updates import Adapters, ClientUpdate, State, Traits, mean_change, weighted
from strategies.mixed_ranks import average_others, padded_average


def correction(missing: LowRank, a: Tensor, ridge: float) -> Tensor:
    """Returns the DeltaB (out, r) for which DeltaB @ A comes near a matrix.

    Args:
        missing: The matrix (out, in).
        a: The factor A (r, in), in float64.
        ridge: Weight of ||DeltaB||^2 beside the squared distance, relative to A's mean squared row norm.

    Example:
        >>> missing = LowRank(up=torch.tensor([[2.0]]).double(), down=torch.tensor([[3.0, 0.0]]).double())
        >>> correction(missing, torch.tensor([[1.0, 0.0]]).double(), ridge=1.0).tolist()  # 6 / (1 + 1)
        [[3.0]]
    """
    rank = a.shape[0]
    gram = a @ a.T
    mean_squared_norm = float(gram.trace()) / rank
    if mean_squared_norm == 0:  # A is zero: no B changes the product
        outputs, _ = missing.shape
        return missing.up.new_zeros(outputs, rank)

    identity = torch.eye(rank, dtype=a.dtype)
    regularised = gram + ridge * mean_squared_norm * identity
    target = missing.up @ (missing.down @ a.T)  # in this order no matrix (out, in) is built
    # `left=False`: DeltaB stands left of the (r x r) matrix.
    return torch.linalg.solve(regularised, target, left=False)


class LoRAFAIR:
    """Averages the factors, and adds to B the part of the mean product that the averages miss.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1, 0]], B=[[0]])
        >>> clients = [lora(A=[[1, 0]], B=[[2]]), lora(A=[[3, 0]], B=[[4]])]
        >>> A, B = one_round(LoRAFAIR(), start, clients).factors("layer")
        >>> A.tolist(), round((B @ A)[0, 0].item(), 3)  # (1 * 2 + 3 * 4) / 2 = 7; FedAvg's product is 2 * 3 = 6
        ([[2.0, 0.0]], 7.0)
    """

    traits = Traits(factors=True, mixed_ranks=True, multiplies=True)

    def __init__(self, ridge: float = 1e-4) -> None:
        """Sets the penalty on the correction.

        Args:
            ridge: Weight of ||DeltaB||^2, relative to the mean squared row norm of the averaged A.

        Raises:
            ValueError: ridge is not above 0.
        """
        if not 0 < ridge < math.inf:
            raise ValueError(f"ridge must be above 0, not {ridge}")
        self._ridge = ridge

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: LoRA-FAIR remembers nothing."""
        return {}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Averages the padded factors and corrects B.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)
        factors = {}
        for layer, (a, b) in padded_average(adapters, updates, weights).items():
            mean = mean_change(updates, weights, layer)
            mean_product = mean.times(1 / adapters.scaling(layer))  # Delta W* / s
            missing = mean_product - LowRank(b, a)
            delta_b = correction(missing, a, self._ridge)
            factors[layer] = a, b + delta_b
        others = average_others(adapters, updates, weights)
        return state, others.with_factors(factors)
