"""The codec topk: the largest values of each row."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsplit.wire.casting import Raw
from fedsplit.wire.codecs import Codec, CodecMemory, Place, Role
from fedsplit.wire.encoded import Encoded, MalformedPacket
from fedsplit.wire.headers import array_in, decoded_part, form_in, form_of, matrix_of, nested


class TopK(Codec):
    """Sends the values of largest magnitude in each row, and the places of the values; `--wire.codec topk:SHARE`.

    The other values of hidden states arrive as 0. The other values of a gradient are added to the gradient of the next
    step at the same place of the batch (error feedback, 1809.07599). The error of the values on the wire, such as
    through `int8`, is added to the next gradient, too.

    Example:
        >>> from fedsplit.wire.packets import StepKey
        >>> codec = TopK(0.25)
        >>> steps = [Role("gradient", "up", StepKey(round=1, client=0, step=step)) for step in range(2)]
        >>> [codec.decode(codec.encode(torch.tensor([1.0, -3.0, 2.0, 0.0]), role), role).tolist() for role in steps]
        [[0.0, -3.0, 0.0, 0.0], [0.0, 0.0, 4.0, 0.0]]
    """

    def __init__(self, share: float, rest: Codec | None = None, remembers: bool = True) -> None:
        """Starts without residuals.

        Args:
            share: Share of the values in a row that cross. At least one value of a row crosses.
            rest: Codec of the values that cross; None for exact values.
            remembers: False for no error feedback.
        """
        self._share = share
        self._rest = rest or Raw()
        self._residuals = CodecMemory[Tensor]()
        self._remembers = remembers

    @classmethod
    def at(cls, place: Place) -> TopK:
        """Returns a new codec for a place in a chain."""
        assert place.parameter is not None
        return cls(place.parameter, place.rest, place.remembers)

    def encode(self, tensor: Tensor, role: Role) -> Encoded:
        """Encodes a tensor. NaN counts as the largest value."""
        form = form_of(tensor, role)
        matrix = self._with_residual(matrix_of(tensor), role)
        largest = matrix.abs().topk(self._count(form.width), sorted=False)
        # Sorted, since a row of bits keeps no order, and the values have to stand in the order of their places.
        places = largest.indices.sort().values
        values = matrix.gather(1, places).to(form.dtype)
        kept = self._rest.encode(values, role)
        if self._has_residuals(role):
            arrived = _spread(self._rest.decode(kept, role).float(), places, form.width)
            self._residuals.set_after(role, matrix - arrived)
        arrays, facts = nested({"kept": kept})
        arrays["places"] = _sent(places, form.width)
        return Encoded(arrays, {**form.header(), **facts})

    def decode(self, encoded: Encoded, role: Role) -> Tensor:
        """Decodes a tensor.

        Raises:
            MalformedPacket: Places or values do not fit the shape.
        """
        form = form_in(encoded, role)
        count = self._count(form.width)
        places = _received(encoded, form.rows, count, form.width)
        values = decoded_part(encoded, "kept", self._rest, role, (form.rows, count))
        return form.tensor(_spread(values, places, form.width))

    def state(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Returns the residuals."""
        return self._residuals.states()

    def restore(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Replaces the residuals."""
        self._residuals.restore(states)

    def _count(self, width: int) -> int:
        """Returns the number of values in a row that cross."""
        return min(width, math.ceil(self._share * width))

    def _has_residuals(self, role: Role) -> bool:
        """Returns True for a gradient. Hidden states of one text say nothing about those of the next text."""
        return self._remembers and role.kind == "gradient"

    def _with_residual(self, matrix: Tensor, role: Role) -> Tensor:
        """Returns the values of a step with the residual of the step before, if both have one shape."""
        residual = self._residuals.before(role) if self._has_residuals(role) else None
        # Texts differ in length, and the last batch of an epoch has fewer of them.
        return matrix if residual is None or residual.shape != matrix.shape else matrix + residual


def _spread(values: Tensor, places: Tensor, width: int) -> Tensor:
    """Returns rows of a width with values at some places, and 0 elsewhere."""
    return torch.zeros(len(values), width).scatter_(1, places, values)


def _place_type(width: int) -> type[np.signedinteger]:
    """Returns the smallest type for places in a row."""
    if width <= 2**7:
        return np.int8
    return np.int16 if width <= 2**15 else np.int32


def _is_bitmap(count: int, width: int) -> bool:
    """Returns True if a bit for each value of a row takes less room than the places of the values that cross."""
    return -(-width // 8) < count * _place_type(width)().itemsize


def _sent(places: Tensor, width: int) -> np.ndarray:
    """Returns places (rows, count) as they cross: a number each, or a row of bits."""
    rows, count = places.shape
    if not _is_bitmap(count, width):
        return places.numpy().astype(_place_type(width))
    bits = torch.zeros(rows, width, dtype=torch.bool).scatter_(1, places, True)
    return np.packbits(bits.numpy(), axis=1)


def _received(encoded: Encoded, rows: int, count: int, width: int) -> Tensor:
    """Returns the places (rows, count) of an encoded tensor.

    Raises:
        MalformedPacket: A place lies outside the row, or a row has another number of places.
    """
    if not _is_bitmap(count, width):
        places = array_in(encoded, "places", _place_type(width), rows, count).long()
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < width:
            raise MalformedPacket(f"a place lies outside a row of {width} values")
        return places
    packed = array_in(encoded, "places", np.uint8, rows, -(-width // 8))
    unpacked = np.unpackbits(packed.numpy(), axis=1, count=width)
    bits = torch.from_numpy(unpacked).bool()
    if not bool((bits.sum(1) == count).all()):
        raise MalformedPacket(f"a row has not {count} places")
    return bits.nonzero()[:, 1].view(rows, count)
