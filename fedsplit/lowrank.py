"""Matrices that are known as a product of two thin ones, and are never multiplied out.

A LoRA layer's change is one; so are a sum of them, the mean over all clients, and what aggregation leaves out.
Everything here costs O((out + in) q^2) for an inner dimension q, where the matrix itself has out * in entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix `up @ down`.

    Attributes:
        up: (out, q).
        down: (q, in).
    """

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """The inner dimension q, which the rank of the matrix does not exceed."""
        return self.down.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.up.nbytes + self.down.nbytes

    def __add__(self, other: LowRank) -> LowRank:
        return total([self, other])

    def __sub__(self, other: LowRank) -> LowRank:
        return total([self, other.times(-1.0)])

    def times(self, factor: float) -> LowRank:
        """The matrix times a number."""
        return LowRank(self.up * factor, self.down)

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same in another type."""
        return LowRank(self.up.to(dtype), self.down.to(dtype))

    def norm(self) -> float:
        """The Frobenius norm."""
        if self.rank == 0:
            return 0.0
        upper, lower = self._triangles()
        return float(torch.linalg.matrix_norm(upper @ lower.T))

    def norm_and_distance(self, other: LowRank) -> tuple[float, float]:
        """The norm of this matrix, and that of what another of its shape differs by, from one QR a side.

        The triangle of this one's columns is what the triangle of both matrices' columns begins with.
        """
        both = total([self, other])
        if both.rank == 0:
            return 0.0, 0.0
        upper, lower = both._triangles()
        own = upper[:, : self.rank] @ lower[:, : self.rank].T
        others = upper[:, self.rank :] @ lower[:, self.rank :].T
        return float(torch.linalg.matrix_norm(own)), float(torch.linalg.matrix_norm(others - own))

    def inner(self, other: LowRank) -> float:
        """The Frobenius inner product with another matrix of this shape."""
        left = self.up.double().T @ other.up.double()
        right = self.down.double() @ other.down.double().T
        return float((left * right).sum())

    def _triangles(self) -> tuple[Tensor, Tensor]:
        """The triangles (p, q) of both sides' QR, which has no need of its bases for norms: (upper, lower)."""
        return torch.linalg.qr(self.up.double(), mode="r").R, torch.linalg.qr(self.down.double().T, mode="r").R

    def _core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal bases of both sides and the small matrix between them: (core, out basis, in basis)."""
        left, upper = torch.linalg.qr(self.up.double())
        right, lower = torch.linalg.qr(self.down.double().T)
        return upper @ lower.T, left, right

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """The singular value decomposition, in float64.

        Returns:
            U (out, p), S (p,) falling, V (p, in), with p the least of out, in and q. The sign of each pair of
            singular vectors is fixed by the largest entry of U's column, so that equal matrices have equal factors.
        """
        core, left, right = self._core()
        u, s, v = torch.linalg.svd(core, full_matrices=False)
        u, v = left @ u, v @ right.T
        if s.numel():
            largest = u.gather(0, u.abs().argmax(0, keepdim=True)).squeeze(0)
            signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
            u, v = u * signs, v * signs[:, None]
        return u, s, v

    def compressed(self, relative: float = 1e-12) -> LowRank:
        """The same matrix with as small an inner dimension as it has rank.

        Args:
            relative: Singular values below this part of the largest are rounding, and dropped.
        """
        u, s, v = self.svd()
        kept = int((s > relative * s[0]).sum()) if s.numel() and float(s[0]) > 0 else 0
        return balanced(u, s, v, kept)


def balanced(u: Tensor, s: Tensor, v: Tensor, rank: int) -> LowRank:
    """The first terms of a singular value decomposition (see `LowRank.svd`), each value shared by both factors.

    It is the nearest matrix of at most that rank (Eckart and Young, 1936).
    """
    root = s[:rank].sqrt()
    return LowRank(u[:, :rank] * root, root[:, None] * v[:rank])


def total(matrices: Iterable[LowRank]) -> LowRank:
    """The sum of matrices of one shape; there must be one at least."""
    listed = list(matrices)
    return LowRank(torch.cat([m.up for m in listed], dim=1), torch.cat([m.down for m in listed], dim=0))
