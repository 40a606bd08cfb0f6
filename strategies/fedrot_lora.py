"""FedRot-LoRA (2602.23638).

Rule: a client's (R^T A_i, B_i R) add the same to the weights for every orthogonal R; R_i is the one that brings them
nearest to what the clients started the round from, and A <- sum_i w_i R_i^T A_i, B <- sum_i w_i B_i R_i.
Nearest is (Procrustes) ||R^T A_i - A_ref||, with R_i = U V^T from the SVD of A_i A_ref^T, or ||B_i R - B_ref||, with
B_i^T B_ref; by default the two take turns: B in the first round, the third and so on, A in the second and so on. B is
zero at the start, so the first round rotates nothing. The schedule is that of the authors' code. With `strength` (the
paper's lambda) below 1, R_i is replaced by the orthogonal matrix nearest to (1 - lambda) I + lambda R_i.
Needs: equal ranks. Costs: both factors up and down once a round; an r x r SVD a client and layer. The authors rotate
at the client; here the server does, with the same result. Not exact: clients that differ by more than a rotation are
averaged factor by factor, as by FedAvg.

Reflections count as rotations here, since they keep the product as well (the paper wants a determinant above 0).
Where the product with the reference has not full rank, many R are equally near: the one nearest to the identity is
taken. So what the reference says nothing of (all of it, where it is zero) is not rotated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, Traits, average_adapters, counted

ALIGNS = ("alternate", "A", "B", "both")

ROUNDING = 1e-6
"""Singular values below this part of the largest say nothing: they are rounding of float32 factors."""


def procrustes(cross: Tensor) -> Tensor:
    """The orthogonal R (r, r) of largest trace(R^T cross); of several, the nearest to the identity.

    Args:
        cross: (r, r), in float64.
    """
    u, s, v = torch.linalg.svd(cross)
    free = s <= ROUNDING * s[0]
    rotation = u[:, ~free] @ v[~free]
    if bool(free.any()):
        left, _, right = torch.linalg.svd(u[:, free].T @ v[free].T)
        rotation = rotation + u[:, free] @ left @ right @ v[free]
    return rotation


def rotation_to(reference: tuple[Tensor, Tensor], a: Tensor, b: Tensor, align: str, strength: float = 1.0) -> Tensor:
    """The R that brings R^T A, B R, or both, nearest to those of a reference.

    Args:
        reference: A (r, in) and B (out, r).
        a: (r, in).
        b: (out, r).
        align: "A", "B" or "both".
        strength: 1 for all the way, 0 for none of it.
    """
    down, up = a.double() @ reference[0].double().T, b.double().T @ reference[1].double()
    whole = procrustes({"A": down, "B": up, "both": down + up}[align])
    return procrustes((1 - strength) * torch.eye(whole.shape[0], dtype=whole.dtype) + strength * whole)


class FedRotLoRA:
    """The average of factors that have been rotated to where the clients started from."""

    traits = Traits(factors=True)

    def __init__(self, align: str = "alternate", strength: float = 1.0) -> None:
        """Chooses what is brought near, and how far.

        Args:
            align: "A", "B", "both" (the sum of the two squared distances), or "alternate".
            strength: How much of the rotation is made: 1 all, 0 none, which is FedAvg.

        Raises:
            ValueError: align is none of these, or strength is not between 0 and 1.
        """
        if align not in ALIGNS:
            raise ValueError(f"align must be {' | '.join(ALIGNS)}, not {align}")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, not {strength}")
        self._align, self._strength = align, strength

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """The number of rounds so far."""
        return {"rounds": torch.tensor(0)}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Rotates every client's factors and averages them.

        Raises:
            ValueError: No client has any example.
        """
        updates, shares = counted(updates)
        align = "BA"[int(state["rounds"]) % 2] if self._align == "alternate" else self._align
        rotated = [replace(update, adapters=self._rotate(adapters, update.adapters, align)) for update in updates]
        mean = average_adapters(adapters, rotated, shares)
        kept = {name: tensor.to(adapters.tensors[name].dtype) for name, tensor in mean.tensors.items()}
        return {"rounds": state["rounds"] + 1}, mean.with_tensors(kept)

    def _rotate(self, reference: Adapters, adapters: Adapters, align: str) -> Adapters:
        """A client's adapters, every layer rotated, in float64: the average rounds them."""
        rotated = {name: tensor.double() for name, tensor in adapters.tensors.items()}
        for layer in adapters.complete:
            a, b = adapters.factors(layer)
            rotation = rotation_to(reference.factors(layer), a, b, align, self._strength)
            rotated[f"{layer}.lora_A.weight"] = rotation.T @ a.double()
            rotated[f"{layer}.lora_B.weight"] = b.double() @ rotation
        return adapters.with_tensors(rotated)
