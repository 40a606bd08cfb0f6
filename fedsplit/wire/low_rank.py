"""The codec lowrank: a matrix of a small rank in place of the tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsplit.seeds import derive_seed
from fedsplit.wire.casting import Raw
from fedsplit.wire.codecs import Codec, CodecMemory, Place, Role
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.headers import Form, decoded_part, form_in, form_of, matrix_of, nested


class LowRank(Codec):
    """Sends two factors whose product comes near the tensor; `--wire.codec lowrank:RANK`.

    One power iteration a step finds the factors (PowerSGD, 1905.13727): with the matrix M (B * T, D) of a step and the
    right factor Q (D, r) of the last step, P is an orthonormal basis of M Q, and the new Q is the transpose of M times
    P. The receiver computes P times the transpose of Q. What a gradient loses is added to the next gradient.

    Example:
        >>> from fedsplit.wire.packets import StepKey
        >>> role = Role("activation", "up", StepKey(round=1, client=0, step=0))
        >>> tensor = torch.ones(2, 50, 100)  # of rank 1
        >>> encoded = LowRank(1).encode(tensor, role)
        >>> encoded.nbytes, torch.allclose(LowRank(1).decode(encoded, role), tensor, atol=1e-5)
        (800, True)
    """

    def __init__(
        self,
        rank: int,
        rest: Codec | None = None,
        remembers: bool = True,
        seed: int = 0,
    ) -> None:
        """Starts without factors.

        Args:
            rank: Largest rank of the matrices.
            rest: Codec of both factors; None for exact factors.
            remembers: False for no state: each step starts from random factors.
            seed: Seed of the run, for the first factors.
        """
        self._rank = rank
        self._rest = rest or Raw()
        self._memory = CodecMemory[Tensor]()
        self._remembers = remembers
        self._seed = seed

    @classmethod
    def at(cls, place: Place) -> LowRank:
        """Returns a new codec for a place in a chain."""
        assert place.parameter is not None
        return cls(int(place.parameter), place.rest, place.remembers, place.seed)

    def encode(self, tensor: Tensor, role: Role) -> Encoded:
        """Encodes a tensor. With a value that is not finite, all values arrive as NaN."""
        form = form_of(tensor, role)
        start, residual = self._before(role, form)
        matrix = matrix_of(tensor) + residual
        rank = self._rank_of(form)
        left = torch.linalg.qr(matrix @ start[:, :rank]).Q
        if not bool(matrix.isfinite().all()):  # what the factorisation makes of such values is not certain
            left = torch.full_like(left, torch.nan)
        right = matrix.T @ left
        sent = {"left": self._rest.encode(left, role), "right": self._rest.encode(right, role)}
        if self._remembers and role.training:
            # A batch of few rows has a smaller rank. The other columns stay for a full batch.
            next_start = torch.cat([right, start[:, rank:]], 1)
            lost = [matrix - self._product(sent, role)] if role.kind == "gradient" else []
            self._memory.set_after(role, torch.cat([next_start.T, *lost]))
        arrays, facts = nested(sent)
        return Encoded(arrays, {**form.header(), **facts})

    def decode(self, encoded: Encoded, role: Role) -> Tensor:
        """Decodes a tensor.

        Raises:
            MalformedPacket: The factors do not fit the shape.
        """
        form = form_in(encoded, role)
        rank = self._rank_of(form)
        left = decoded_part(encoded, "left", self._rest, role, (form.rows, rank))
        right = decoded_part(encoded, "right", self._rest, role, (form.width, rank))
        return form.tensor(left @ right.T)

    def state(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Returns the right factors, above the residuals of gradients."""
        return self._memory.states()

    def restore(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Replaces factors and residuals."""
        self._memory.restore(states)

    def _rank_of(self, form: Form) -> int:
        """Returns the rank of the factors: a matrix has no larger rank than rows or columns."""
        return min(self._rank, form.rows, form.width)

    def _product(self, sent: Mapping[str, Encoded], role: Role) -> Tensor:
        """Returns the matrix that the receiver computes from both factors."""
        left, right = (self._rest.decode(sent[side], role).float() for side in ("left", "right"))
        return left @ right.T

    def _before(self, role: Role, form: Form) -> tuple[Tensor, Tensor]:
        """Returns the right factor to start from (D, r), and the residual to add (rows, D) or zero."""
        memory = self._memory.before(role) if self._remembers else None
        if memory is None or memory.shape[1] != form.width:
            return self._first_factor(role, form.width), torch.zeros(())
        start, residual = memory[: self._rank].T, memory[self._rank :]
        # The last batch of an epoch has fewer rows. Hidden states have no residual.
        return start, residual if len(residual) == form.rows else torch.zeros(())

    def _first_factor(self, role: Role, width: int) -> Tensor:
        """Returns a random factor (D, r)."""
        # From the seed and the place alone: a round that is repeated begins with the same factor.
        seed = derive_seed(self._seed, "codec", role.kind, role.direction, role.client)
        return torch.randn(width, self._rank, generator=torch.Generator().manual_seed(seed))
