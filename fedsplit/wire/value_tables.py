"""Codecs of 4 bits with a table of values, and the MX formats: nf4, mxfp4 and mxfp8."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsplit.wire.codecs import Role
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.grouped import Float8, Grouped, packed, unpacked
from fedsplit.wire.headers import Form, array_in

_NORMAL_FLOATS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _places(units: Tensor, middles: Tensor) -> Tensor:
    """Returns how many of some numbers lie below each value, as `torch.bucketize` does in ten times the time."""
    places = torch.zeros(units.shape, dtype=torch.uint8)
    for middle in middles.tolist():
        places += units > middle
    return places


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    """Returns numbers of a table by their places."""
    return table.index_select(0, places.flatten().int()).view(places.shape)


class NormalFloat4(Grouped):
    """Rounds to one of 16 quantiles of a normal distribution, times a scale for each 64 values; `--wire.codec nf4`.

    The table is that of QLoRA (2305.14314, appendix E). The error is at most 0.152 of a scale.

    Example:
        >>> from fedsplit.wire.packets import StepKey
        >>> role = Role("activation", "up", StepKey(round=1, client=0, step=0))
        >>> NormalFloat4().decode(NormalFloat4().encode(torch.tensor([2.0, -2.0, 0.1]), role), role)
        tensor([ 2.0000, -2.0000,  0.1592])
    """

    top = 1.0
    _table = torch.tensor(_NORMAL_FLOATS)
    _middles = (_table[1:] + _table[:-1]) / 2

    def codes(self, units: Tensor, role: Role) -> np.ndarray:
        """Returns half a byte for each value: the place of the nearest number of the table."""
        return packed(_places(units, self._middles))

    def units(self, encoded: Encoded, form: Form) -> Tensor:
        """Returns the numbers of the table."""
        return _looked_up(self._table, unpacked(encoded, form))


class _Microscaled(Grouped):
    """Base of the MX formats (OCP Microscaling Formats, version 1.0): one power of two for each 32 values.

    Attributes:
        exponent: Exponent of the largest number of the elements' type.
    """

    group: int | None = 32
    exponent: int

    def scales(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Returns exponents in a byte each, and the powers of two. As the format asks, large values may exceed `top`.

        Args:
            largest: Largest magnitude of each group.
        """
        # `frexp` returns a mantissa from 0.5 to 1, so that its exponent is one more than the logarithm.
        exponents = (torch.frexp(largest).exponent - 1 - self.exponent).clamp(-_BIAS, _BIAS)
        sent = torch.where(largest.isfinite(), exponents + _BIAS, _NAN).to(torch.uint8)
        return sent, _powers(sent)

    def read_scales(self, encoded: Encoded, count: int) -> Tensor:
        """Returns the powers of two of an encoded tensor.

        Raises:
            MalformedPacket: The scales have another number or type.
        """
        return _powers(array_in(encoded, "scales", np.uint8, count))


# The type E8M0 of the MX formats: an exponent with a bias in a byte, whose largest value stands for NaN.
_BIAS = 127
_NAN = 255


def _powers(sent: Tensor) -> Tensor:
    """Returns the powers of two of exponents in a byte each; the largest byte stands for NaN."""
    powers = torch.ldexp(torch.ones(sent.shape), sent.int() - _BIAS)
    return powers.masked_fill(sent == _NAN, torch.nan)


class MxFloat8(_Microscaled, Float8):
    """Rounds to floats with 3 bits of mantissa times a power of two for each 32 values; `--wire.codec mxfp8`.

    The error is at most an 8th of the value for the largest values of a group, which are cut off at 448, and a 16th
    for others, or 2^-10 of the scale for small values.
    """

    dtype = torch.float8_e4m3fn
    top = 448.0
    exponent = 8


class MxFloat4(_Microscaled):
    """Rounds to 0, 0.5, 1, 1.5, 2, 3, 4 or 6 times a power of two for each 32 values; `--wire.codec mxfp4`.

    The error is at most a quarter of the group's largest magnitude.
    """

    top = 6.0
    exponent = 2
    _table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    _middles = (_table[1:] + _table[:-1]) / 2
    # A value in the middle goes to the neighbour with an even code. `_places` sends it down, so that every second
    # middle lies a little lower.
    _middles[1::2] = torch.nextafter(_middles[1::2], torch.zeros(()))

    def codes(self, units: Tensor, role: Role) -> np.ndarray:
        """Returns half a byte for each value: three bits of the number, and one of the sign."""
        magnitudes = _places(units.abs(), self._middles)
        signs = torch.signbit(units).to(torch.uint8) << 3
        return packed(magnitudes | signs)

    def units(self, encoded: Encoded, form: Form) -> Tensor:
        """Returns the numbers of the table, with their signs."""
        return _looked_up(torch.cat([self._table, -self._table]), unpacked(encoded, form))
