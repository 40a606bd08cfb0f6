"""FedSVD (2505.12805): train B, then make A orthonormal by an SVD of the product.

Rule:
    clients train B, with A frozen
    Bbar = sum_i w_i B_i
    Bbar A = U S V^T
    A <- V^T, B <- U S
The new product is the mean of the products, exactly. The rows of A are orthonormal, which bounds the effect on the
product of noise on B's gradient.

Needs: equal ranks.
Costs: B up, both factors down; an SVD of a matrix (out x r) a layer, from a QR of A.

If Bbar A has a rank below r, the remaining rows of A complete an orthonormal basis of A's old row space, with zero
columns of B. So A always has r orthonormal rows, and the row space never changes: a round changes the basis in which
clients train. As in the authors' code, A becomes orthonormal at the end of round 1. In round 1 clients train with the
drawn A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsplit.updates import (
    Adapters,
    Assignment,
    ClientInfo,
    ClientUpdate,
    State,
    Task,
    Traits,
    average_adapters,
    weighted,
)


def orthonormal(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factors (A, B) of the same product B A, with orthonormal rows of A in falling order of singular values.

    Args:
        a: A (r, in).
        b: B (out, r).

    Example:
        >>> A, B = orthonormal(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]))
        >>> [[round(entry, 6) for entry in row] for row in (A[0].tolist(), B[0].tolist())]
        [[0.6, 0.8], [10.0]]
    """
    # A^T = basis @ triangle, so B A = (B triangle^T) basis^T, and an SVD of the small matrix is enough.
    basis, triangle = torch.linalg.qr(a.double().T)
    inner = b.double() @ triangle.T
    # A reduced SVD gives r rows of V, unless the layer has fewer than r outputs.
    has_few_outputs = inner.shape[0] < inner.shape[1]
    u, s, v = torch.linalg.svd(inner, full_matrices=has_few_outputs)

    new_a = torch.zeros_like(a, dtype=torch.float64)
    new_b = torch.zeros_like(b, dtype=torch.float64)
    filled = s.shape[0]
    new_a[: v.shape[0]] = v @ basis.T
    new_b[:, :filled] = u[:, :filled] * s

    # An SVD leaves the signs open. Make the largest entry of each row positive, so that A does not flip for nothing.
    columns = new_a.abs().argmax(1, keepdim=True)
    largest = new_a.gather(1, columns)
    signs = torch.where(largest < 0, -1.0, 1.0).to(new_a.dtype)
    return new_a * signs, new_b * signs.T


class FedSVD:
    """Averages B and makes the rows of A orthonormal in every round.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[3, 4]], B=[[0]])
        >>> clients = [lora(A=[[3, 4]], B=[[1]]), lora(A=[[3, 4]], B=[[3]])]
        >>> A, B = one_round(FedSVD(), start, clients).factors("layer")
        >>> [round(entry, 4) for entry in (*A[0].tolist(), B.item())]
        [0.6, 0.8, 10.0]
    """

    traits = Traits(factors=True, linear=True, multiplies=True)

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: FedSVD remembers nothing."""
        return {}

    def broadcast(self, state: State, adapters: Adapters, client: ClientInfo) -> Assignment:
        """Sends both factors and asks the client to train B alone."""
        task = Task(trains=frozenset("B"))
        return Assignment(adapters.with_rank(client.rank), task)

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Averages B and makes the rows of A orthonormal.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)
        mean = average_adapters(adapters, updates, weights)
        factors = {}
        for layer in mean.complete:
            a, b = mean.factors(layer)
            factors[layer] = orthonormal(a, b)
        return state, mean.with_factors(factors)
