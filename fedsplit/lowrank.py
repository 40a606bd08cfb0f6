"""Low-rank matrices, stored as a product of two thin factors. The product is never computed.

The change of a LoRA layer is such a matrix. So are a sum of changes, the mean over all clients, and the error of an
aggregation. Every operation costs O((out + in) q^2) for the inner dimension q; the matrix has out * in entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A matrix (out, in), stored as the factors of `up @ down`.

    Attributes:
        up: Left factor (out, q).
        down: Right factor (q, in).

    Example:
        >>> change = LowRank(torch.ones(3, 1), torch.ones(1, 4))
        >>> (change + change).rank, (change + change).compressed().rank
        (2, 1)
        >>> round(change.norm(), 3)  # the root of twelve
        3.464
    """

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the matrix."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Inner dimension q, an upper bound on the rank of the matrix."""
        return self.down.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of both factors in bytes."""
        return self.up.nbytes + self.down.nbytes

    def __add__(self, other: LowRank) -> LowRank:
        return total([self, other])

    def __sub__(self, other: LowRank) -> LowRank:
        return total([self, other.times(-1.0)])

    def times(self, factor: float) -> LowRank:
        """Returns the matrix multiplied by a number."""
        return LowRank(self.up * factor, self.down)

    def to(self, dtype: torch.dtype) -> LowRank:
        """Returns the matrix with factors of another type."""
        return LowRank(self.up.to(dtype), self.down.to(dtype))

    def norm(self) -> float:
        """Returns the Frobenius norm."""
        if self.rank == 0:
            return 0.0
        upper, lower = self._triangles()
        return float(torch.linalg.matrix_norm(upper @ lower.T))

    def norm_and_distance(self, other: LowRank) -> tuple[float, float]:
        """Returns the Frobenius norm of the matrix, and of its difference from another matrix of equal shape."""
        both = total([self, other])
        if both.rank == 0:
            return 0.0, 0.0
        # One QR decomposition of the stacked factors serves both matrices. Its first columns belong to this matrix.
        upper, lower = both._triangles()
        this_core = upper[:, : self.rank] @ lower[:, : self.rank].T
        other_core = upper[:, self.rank :] @ lower[:, self.rank :].T
        norm = torch.linalg.matrix_norm(this_core)
        distance = torch.linalg.matrix_norm(other_core - this_core)
        return float(norm), float(distance)

    def inner(self, other: LowRank) -> float:
        """Returns the Frobenius inner product with another matrix of equal shape."""
        # <U D, V E> = <U^T V, D E^T>, whose factors are (q, q).
        left = self.up.double().T @ other.up.double()
        right = self.down.double() @ other.down.double().T
        return float((left * right).sum())

    def _triangles(self) -> tuple[Tensor, Tensor]:
        """Returns the triangles (p, q) of the QR decompositions of both factors.

        A product with an orthonormal basis keeps the Frobenius norm, so that norms need no bases.
        """
        upper = torch.linalg.qr(self.up.double(), mode="r").R
        lower = torch.linalg.qr(self.down.double().T, mode="r").R
        return upper, lower

    def _core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the small matrix between orthonormal bases of both sides, and the bases: (core, out, in)."""
        left, upper = torch.linalg.qr(self.up.double())
        right, lower = torch.linalg.qr(self.down.double().T)
        return upper @ lower.T, left, right

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the singular value decomposition in float64.

        Returns:
            U (out, p), S (p,) in descending order, and V (p, in), where p is the minimum of out, in and q. The largest
            entry of each column of U is positive, so that equal matrices have equal factors.
        """
        core, left, right = self._core()
        core_u, s, core_v = torch.linalg.svd(core, full_matrices=False)
        u = left @ core_u
        v = core_v @ right.T
        if s.numel():
            # A singular value decomposition leaves the sign of each pair of vectors open.
            rows_of_largest = u.abs().argmax(0, keepdim=True)
            largest = u.gather(0, rows_of_largest).squeeze(0)
            signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
            u = u * signs
            v = v * signs[:, None]
        return u, s, v

    def compressed(self, relative: float = 1e-12) -> LowRank:
        """Returns the same matrix with an inner dimension equal to its rank.

        Args:
            relative: Singular values below this fraction of the largest count as rounding errors and are dropped.
        """
        u, s, v = self.svd()
        is_zero = not s.numel() or float(s[0]) <= 0
        rank = 0 if is_zero else int((s > relative * s[0]).sum())
        return balanced(u, s, v, rank)


def balanced(u: Tensor, s: Tensor, v: Tensor, rank: int) -> LowRank:
    """Returns the nearest matrix of at most a given rank (Eckart and Young, 1936).

    The result consists of the first terms of a singular value decomposition. Each factor gets the square root of the
    singular values.

    Args:
        u: U (out, p), as `LowRank.svd` returns it.
        s: S (p,).
        v: V (p, in).
        rank: Number of terms.

    Example:
        >>> identity = LowRank(torch.eye(3), torch.eye(3))
        >>> balanced(*identity.svd(), rank=1).rank
        1
    """
    root = s[:rank].sqrt()
    return LowRank(u[:, :rank] * root, root[:, None] * v[:rank])


def total(matrices: Iterable[LowRank]) -> LowRank:
    """Returns the sum of one or more matrices of equal shape: their factors, side by side.

    Example:
        >>> total([LowRank(torch.ones(3, 1), torch.ones(1, 4)), LowRank(torch.ones(3, 2), torch.ones(2, 4))]).rank
        3
    """
    listed = list(matrices)
    up = torch.cat([matrix.up for matrix in listed], dim=1)
    down = torch.cat([matrix.down for matrix in listed], dim=0)
    return LowRank(up, down)
