"""FedSVD (2505.12805).

Rule: clients train B, with A frozen; the server takes Bbar = sum_i w_i B_i and the SVD Bbar A = U S V^T, and sets
A <- V^T, B <- U S. Their product is the mean of the products, exactly, and A's rows are orthonormal, which bounds what
noise on B's gradient does to the product.
Needs: equal ranks. Costs: B up, both factors down; an SVD of an (out x r) matrix a layer, from a QR of A.

Where Bbar A has a rank below r, the other rows of A are the rest of an orthonormal basis of A's old row space (their
columns of B are zero), so that A always has r orthonormal rows. It follows that the row space is the start's for good:
what changes from round to round is the basis of it in which clients train. As in the authors' code, A is made
orthonormal after a round only, and the clients of the first train with A as it was drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, Task, Traits, average_adapters, counted


def orthonormal(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (A, B) of the same product whose A has orthonormal rows, in falling order of singular values.

    Args:
        a: (r, in).
        b: (out, r).
    """
    basis, triangle = torch.linalg.qr(a.double().T)  # A^T = basis @ triangle, so B A = (B triangle^T) basis^T
    inner = b.double() @ triangle.T
    # V has a row for every row of A by itself, unless the layer has fewer outputs than that
    u, s, v = torch.linalg.svd(inner, full_matrices=inner.shape[0] < inner.shape[1])
    down, up = torch.zeros_like(a, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)
    down[: v.shape[0]] = v @ basis.T
    up[:, : s.shape[0]] = u[:, : s.shape[0]] * s
    largest = down.gather(1, down.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(down.dtype)  # an SVD leaves them open; A does not flip for nothing
    return down * signs, up * signs.T


class FedSVD:
    """The average of B, and an orthonormal A anew in every round."""

    traits = Traits(linear=True, factors=True)

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """FedSVD remembers nothing."""
        return {}

    def broadcast(self, state: Mapping[str, Tensor], adapters: Adapters, client: ClientInfo) -> Assignment:
        """Both factors, of which B trains."""
        return Assignment(adapters.with_rank(client.rank), Task(trains=frozenset("B")))

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Averages B and makes the rows of A orthonormal.

        Raises:
            ValueError: No client has any example.
        """
        mean = average_adapters(adapters, *counted(updates))
        return state, mean.with_factors({layer: orthonormal(*mean.factors(layer)) for layer in mean.complete})
