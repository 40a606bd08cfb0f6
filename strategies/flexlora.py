"""FlexLoRA (2402.11505): average the products and split the mean by an SVD.

Rule:
    Delta W* = sum_i w_i s_i B_i A_i = U S V^T
    A <- (S_r / s)^(1/2) V_r^T
    B <- U_r (S_r / s)^(1/2)
r is the largest rank and s the scaling at r. Then s B A = U_r S_r V_r^T is the matrix of rank r nearest to Delta W*
(Eckart and Young). Singular values fall, so the first r_j rows of A and columns of B are the nearest matrix for a
client of rank r_j: broadcasting only has to cut.

Needs: nothing; ranks may differ.
Costs: both factors up and down once a round, each at the client's rank; an SVD a layer, from a QR of the stacked
factors: O((out + in) q^2 + q^3) with q = sum_i r_i, and never a dense matrix.

Beyond the paper: if Delta W* has a rank p < r, its singular vectors fill p rows only. Rows of A and columns of B that
are both zero would never get a gradient again. So the other r - p rows come from the previous A: the part orthogonal to
the p rows, its principal directions with their lengths, longest first. Their columns of B are zero, which leaves the
product as it is. In the first round, clients get the A that the run began with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsplit.lowrank import LowRank
from fedsplit.updates import Adapters, ClientUpdate, State, Traits, mean_change, weighted
from strategies.mixed_ranks import average_others

ROUNDING = 1e-7
"""Singular values below this share of the largest are rounding errors of float32 factors."""


def best_factors(change: LowRank, scaling: float, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the factors (A, B) with scaling * B @ A nearest to a matrix, and with no zero row in A.

    Args:
        change: The matrix (out, in).
        scaling: LoRA's s at the rank of `previous`.
        previous: The last round's A (r, in). It sets the rank and fills the rows that the matrix leaves empty.

    Example:
        >>> change = LowRank(up=torch.tensor([[4.0]]).double(), down=torch.tensor([[1.0, 0.0]]).double())
        >>> A, B = best_factors(change, 1.0, previous=torch.tensor([[0.0, 1.0]]))
        >>> (B @ A).tolist()
        [[4.0, 0.0]]
    """
    rank = previous.shape[0]
    u, s, v = change.svd()
    # Number of singular vectors that carry information; 0 if no client changed anything.
    filled = 0
    largest = float(s[0])
    if largest > 0:
        is_information = s > ROUNDING * s[0]
        filled = min(rank, int(is_information.sum()))

    root = (s[:filled] / scaling).sqrt()
    a = torch.zeros_like(previous, dtype=torch.float64)
    b = a.new_zeros(u.shape[0], rank)
    directions = v[:filled]
    a[:filled] = root[:, None] * directions
    b[:, :filled] = u[:, :filled] * root

    # Fill the other rows of A, so that they can learn; their columns of B stay zero.
    rest = _orthogonal_part(previous.double(), directions)
    rest = rest[: rank - filled]
    end = filled + len(rest)
    a[filled:end] = rest
    return a, b


def _orthogonal_part(rows: Tensor, basis: Tensor) -> Tensor:
    """Returns the principal directions, with their lengths, of the part of `rows` orthogonal to orthonormal rows."""
    orthogonal = rows - rows @ basis.T @ basis
    _, lengths, directions = torch.linalg.svd(orthogonal, full_matrices=False)
    return lengths[:, None] * directions


class FlexLoRA:
    """Replaces the factors by the best fit of the mean change at the largest rank.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1, 0]], B=[[0]])
        >>> clients = [lora(A=[[1, 0]], B=[[2]]), lora(A=[[3, 0]], B=[[4]])]
        >>> A, B = one_round(FlexLoRA(), start, clients).factors("layer")
        >>> round((B @ A)[0, 0].item(), 3)  # (1 * 2 + 3 * 4) / 2
        7.0
    """

    traits = Traits(factors=True, mixed_ranks=True, multiplies=True)

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: FlexLoRA remembers nothing."""
        return {}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Replaces the factors of every layer by the singular vectors of the mean change.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)
        factors = {}
        for layer in adapters.complete:
            previous_a, _ = adapters.factors(layer)
            change = mean_change(updates, weights, layer)
            scaling = adapters.scaling(layer)
            factors[layer] = best_factors(change, scaling, previous_a)
        others = average_others(adapters, updates, weights)
        return state, others.with_factors(factors)
