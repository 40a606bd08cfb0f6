"""FlexLoRA (2402.11505).

Rule: Delta W* = sum_i w_i s_i B_i A_i = U S V^T; with s the scaling at the largest rank r,
A <- (S_r / s)^(1/2) V_r^T and B <- U_r (S_r / s)^(1/2), so that s B A = U_r S_r V_r^T is the nearest matrix of rank r
(Eckart and Young). Singular vectors stand in falling order of their singular values, so a client of rank r_j that is
given the first r_j of them has the nearest matrix of its own rank: cutting is all that broadcasting takes.
Needs: nothing; ranks may differ. Costs: both factors up and down once a round, each at the client's rank; an SVD a
layer, from a QR of the stacked factors: O((out + in) q^2 + q^3) with q = sum_i r_i, and never the dense matrix.

Where Delta W* has a rank p < r, its singular vectors fill p rows only. Rows of A and columns of B that are both zero
would never get a gradient again, so the other rows of A are taken from the previous global A, made orthogonal to the
p rows (of several such rows, the r - p principal directions, with their lengths); their columns of B are zero, and the
product is what it was. This is an addition to the paper's rule. A client of the first round is given the start's A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.lowrank import LowRank
from fedsplit.updates import Adapters, ClientUpdate, Traits, counted, mean_change
from strategies.mixed_ranks import average_others

ROUNDING = 1e-7
"""Singular values below this part of the largest are rounding of float32 factors."""


def best_factors(change: LowRank, scaling: float, previous: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (A, B) of which scaling * B @ A is the nearest to a matrix, and no row of A is zero.

    Args:
        change: The matrix (out, in).
        scaling: LoRA's s at the rank of `previous`.
        previous: The A (r, in) before, which gives the rank and the rows that the matrix does not fill.
    """
    u, s, v = change.svd()
    filled = int((s > ROUNDING * s[0]).sum()) if float(s[0]) > 0 else 0
    filled = min(filled, previous.shape[0])
    root = (s[:filled] / scaling).sqrt()
    a = torch.zeros_like(previous, dtype=torch.float64)
    b = a.new_zeros(u.shape[0], previous.shape[0])
    a[:filled], b[:, :filled] = root[:, None] * v[:filled], u[:, :filled] * root
    left_over = _orthogonal_rows(previous.double(), v[:filled])[: previous.shape[0] - filled]
    a[filled : filled + left_over.shape[0]] = left_over
    return a, b


def _orthogonal_rows(rows: Tensor, taken: Tensor) -> Tensor:
    """The principal directions, with their lengths, of what rows have beside some orthonormal ones; longest first."""
    _, lengths, directions = torch.linalg.svd(rows - rows @ taken.T @ taken, full_matrices=False)
    return lengths[:, None] * directions


class FlexLoRA:
    """The best fit of the mean change at every client's rank."""

    traits = Traits(mixed_ranks=True, factors=True)

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """FlexLoRA remembers nothing."""
        return {}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Replaces the factors of every layer by the singular vectors of the mean change.

        Raises:
            ValueError: No client has any example.
        """
        updates, shares = counted(updates)
        factors = {
            layer: best_factors(
                mean_change(updates, shares, layer), adapters.scaling(layer), adapters.factors(layer)[0]
            )
            for layer in adapters.complete
        }
        return state, average_others(adapters, updates, shares).with_factors(factors)
