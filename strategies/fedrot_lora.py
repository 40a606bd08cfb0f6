"""FedRot-LoRA (2602.23638): rotate each client's factors towards a common reference, then average.

Rule:
    A <- sum_i w_i R_i^T A_i
    B <- sum_i w_i B_i R_i
(R^T A_i, B_i R) change the weights as (A_i, B_i) do, for every orthogonal R. R_i is the R that brings the factors of
client i nearest to the reference: the factors at the start of the round. Two distances are possible (orthogonal
Procrustes problems):
    align A: ||R^T A_i - A_ref||, with R_i = U V^T from the SVD of A_i A_ref^T
    align B: ||B_i R - B_ref||, with R_i = U V^T from the SVD of B_i^T B_ref
By default the distances alternate: B in odd rounds, A in even rounds, as in the authors' code. B is zero at the
beginning of a run, so round 1 rotates nothing. With `strength` (the paper's lambda) below 1, R_i is replaced by the
orthogonal matrix nearest to (1 - lambda) I + lambda R_i.

Needs: equal ranks.
Costs: both factors up and down once a round; an SVD (r x r) a client and layer. The authors rotate at the client. In
this file the server rotates, with the same result.
Not exact: clients that differ by more than a rotation are averaged factor by factor, as in FedAvg.

Reflections count as rotations, since a reflection keeps the product as well (the paper requires a determinant above 0).
If the product with the reference lacks full rank, many R are equally near, and the R nearest to the identity is taken.
So nothing is rotated in directions outside of the reference, and a reference of zero rotates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, State, Traits, average_adapters, weighted

ALIGNS = ("alternate", "A", "B", "both")
"""Values of the option `align`."""

ROUNDING = 1e-6
"""Share of the largest singular value. Singular values below the share are rounding errors of float32 factors."""


def procrustes(cross: Tensor) -> Tensor:
    """Returns the orthogonal R (r, r) with the largest trace(R^T cross); of several, the nearest to the identity.

    Args:
        cross: The matrix (r, r), in float64.

    Example:
        >>> procrustes(torch.tensor([[0.0, -2.0], [1.0, 0.0]]).double()).tolist()
        [[0.0, -1.0], [1.0, 0.0]]
    """
    u, s, v = torch.linalg.svd(cross)
    free = s <= ROUNDING * s[0]
    rotation = u[:, ~free] @ v[~free]
    if bool(free.any()):
        # `cross` tells nothing about the free directions. Solve the same problem there, with the identity for `cross`.
        free_u = u[:, free]
        free_v = v[free]
        left, _, right = torch.linalg.svd(free_u.T @ free_v.T)
        rotation = rotation + free_u @ left @ right @ free_v
    return rotation


def rotation_to(
    reference: tuple[Tensor, Tensor],
    a: Tensor,
    b: Tensor,
    align: str,
    strength: float = 1.0,
) -> Tensor:
    """Returns the R (r, r) that brings R^T A, B R, or both, nearest to a reference.

    Args:
        reference: Factors A (r, in) and B (out, r).
        a: A (r, in).
        b: B (out, r).
        align: "A", "B" or "both".
        strength: Share of the rotation to make: 1 all of it, 0 none.

    Example:
        >>> eye = torch.eye(2)
        >>> turned = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> rotation_to((eye, eye), turned, eye, align="A").tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    reference_a, reference_b = reference
    cross_a = a.double() @ reference_a.double().T
    cross_b = b.double().T @ reference_b.double()
    cross = {"A": cross_a, "B": cross_b, "both": cross_a + cross_b}
    full = procrustes(cross[align])

    identity = torch.eye(full.shape[0], dtype=full.dtype)
    # Projected again: a mean of two orthogonal matrices is not orthogonal.
    return procrustes((1 - strength) * identity + strength * full)


class FedRotLoRA:
    """Rotates the factors of each client towards the factors at the start of the round, then averages.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1, 0], [0, 1]], B=[[0, 0]])
        >>> same_rows_swapped = lora(A=[[0, 1], [1, 0]], B=[[0, 0]])
        >>> result = one_round(FedRotLoRA(align="A"), start, [start, same_rows_swapped])
        >>> result.factors("layer")[0].tolist()  # FedAvg would make every entry 0.5
        [[1.0, 0.0], [0.0, 1.0]]
    """

    traits = Traits(factors=True, multiplies=True)

    def __init__(self, align: str = "alternate", strength: float = 1.0) -> None:
        """Sets the alignment.

        Args:
            align: "A", "B", "both" (the sum of the two squared distances), or "alternate".
            strength: Share of the rotation to make: 1 all of it; 0 none, which is FedAvg.

        Raises:
            ValueError: align is unknown, or strength is not between 0 and 1.
        """
        if align not in ALIGNS:
            raise ValueError(f"align must be {' | '.join(ALIGNS)}, not {align}")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, not {strength}")
        self._align = align
        self._strength = strength

    def init(self, adapters: Adapters) -> State:
        """Returns the number of rounds so far."""
        return {"rounds": torch.tensor(0)}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Rotates the factors of every client, then averages.

        Raises:
            ValueError: No client trained on any example.
        """
        updates, weights = weighted(updates)
        align = self._align
        if align == "alternate":
            align = "BA"[int(state["rounds"]) % 2]  # 0 rounds so far in round 1

        rotated = []
        for update in updates:
            turned = self._rotate(adapters, update.adapters, align)
            rotated.append(replace(update, adapters=turned))
        mean = average_adapters(adapters, rotated, weights)

        # The rotated factors are in float64, so that only the average is rounded.
        tensors = {}
        for name, tensor in mean.tensors.items():
            before = adapters.tensors[name]
            tensors[name] = tensor.to(before.dtype)
        next_state = {"rounds": state["rounds"] + 1}
        return next_state, mean.with_tensors(tensors)

    def _rotate(self, reference: Adapters, adapters: Adapters, align: str) -> Adapters:
        """Returns a client's adapters with every layer rotated, in float64."""
        exact = adapters.in_float64()
        rotated = {}
        for layer in exact.complete:
            a, b = exact.factors(layer)
            rotation = rotation_to(reference.factors(layer), a, b, align, self._strength)
            rotated[f"{layer}.lora_A.weight"] = rotation.T @ a
            rotated[f"{layer}.lora_B.weight"] = b @ rotation
        return exact.updated(rotated)
