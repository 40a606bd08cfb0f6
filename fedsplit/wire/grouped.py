"""Codecs with a scale for each group of values: whole numbers of 8 and 4 bits, and floats of 8 bits.

A group lies along the last dimension, so that one large value spoils its own group alone. The values of a group are
divided by a scale, and become codes in a range that the subclass chooses.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.seeds import derive_seed
from fedsplit.wire.codecs import Codec, Place, Role
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.headers import Form, array_in, form_in, form_of, matrix_of


class Grouped(Codec):
    """Divides the values of each group by a scale, and sends codes and scales.

    Subclasses choose codes and scales. All scales are at least the largest magnitude of the group divided by `top`.

    Attributes:
        group: Values of a group; None for a group of the whole last dimension.
        top: Largest magnitude of a value behind the division by the scale.
    """

    group: int | None = 64
    top: float

    def encode(self, tensor: Tensor, role: Role) -> Encoded:
        """Encodes a tensor. A group with NaN or an infinite value is decoded as NaN."""
        form = form_of(tensor, role)
        matrix = matrix_of(tensor)
        size, groups = self._division(form.width)
        missing = size * groups - form.width
        padded = functional.pad(matrix, (0, missing)).view(form.rows * groups, size)
        # `amax` has no result for groups without values.
        sent_scales, scales = self.scales(padded.abs().amax(1) if size else padded.sum(1))
        units = (padded / scales[:, None]).view(form.rows, groups * size)[:, : form.width]
        codes = self.codes(units, role)
        return Encoded({"codes": codes, "scales": sent_scales.numpy()}, form.header())

    def decode(self, encoded: Encoded, role: Role) -> Tensor:
        """Decodes a tensor.

        Raises:
            MalformedPacket: The arrays do not fit the shape.
        """
        form = form_in(encoded, role)
        size, groups = self._division(form.width)
        scales = self.read_scales(encoded, form.rows * groups)
        units = self.units(encoded, form)
        missing = size * groups - form.width
        padded = functional.pad(units, (0, missing)).view(form.rows * groups, size)
        values = (padded * scales[:, None]).view(form.rows, groups * size)[:, : form.width]
        return form.tensor(values)

    def _division(self, width: int) -> tuple[int, int]:
        """Returns the number of values in a group, and of groups in a row."""
        size = min(self.group or width, width)
        return size, -(-width // size) if size else 0

    def scales(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scales as they are sent, and as float32.

        Args:
            largest: Largest magnitude of each group.
        """
        exact = largest / self.top
        # bfloat16 has the range of float32. Rounded upwards, so that no value exceeds `top`. The smallest scale
        # stands for groups of zeros, which would otherwise be divided by zero.
        rounded = exact.clamp(min=_SMALLEST).to(torch.bfloat16)
        # The bits of a positive float, plus 1, are those of the next larger float.
        bits = rounded.view(torch.int16) + (rounded.float() < exact)
        sent = bits.to(torch.int16)
        return sent, sent.view(torch.bfloat16).float()

    def read_scales(self, encoded: Encoded, count: int) -> Tensor:
        """Returns the scales of an encoded tensor as float32.

        Raises:
            MalformedPacket: The scales have another number or type.
        """
        return array_in(encoded, "scales", np.int16, count).view(torch.bfloat16).float()

    @abstractmethod
    def codes(self, units: Tensor, role: Role) -> np.ndarray:
        """Returns the codes of values.

        Args:
            units: Values behind the division by their scales (rows, width), up to `top` in magnitude.
            role: Place of the tensor.
        """

    @abstractmethod
    def units(self, encoded: Encoded, form: Form) -> Tensor:
        """Returns the values (rows, width) of an encoded tensor before the multiplication by their scales.

        Raises:
            MalformedPacket: The codes have another number or type.
        """


_SMALLEST = 2.0**-126
"""Smallest normal number of float32 and bfloat16."""


class Int8(Grouped):
    """Rounds to whole numbers from -127 to 127 times a scale for each 64 values; `--wire.codec int8`.

    The error is at most half a scale, and a scale is at most 1.008 times the group's largest magnitude over 127.

    Example:
        >>> from fedsplit.wire.packets import StepKey
        >>> role = Role("activation", "up", StepKey(round=1, client=0, step=0))
        >>> encoded = Int8().encode(torch.tensor([[0.3, -127.0]]), role)
        >>> Int8().decode(encoded, role)
        tensor([[   0., -127.]])
    """

    top = 127.0

    def __init__(self, seed: int | None = None) -> None:
        """Prepares for rounding.

        Args:
            seed: Seed of the run for stochastic rounding; None for rounding to the nearest number.
        """
        self._seed = seed

    def rounded(self, units: Tensor, role: Role) -> Tensor:
        """Returns whole numbers, up to `top` in magnitude."""
        if self._seed is None:
            return units.round().clamp(-self.top, self.top)
        key = role.key
        # Without the attempt: a round that is repeated draws the same numbers. A generator for each tensor: torch's
        # own generator draws the dropout, and stays as it is.
        step = (key.round, key.client, key.step, key.batch, key.micro)
        path = ("codec", role.kind, role.direction, *step, role.training)
        generator = torch.Generator().manual_seed(derive_seed(self._seed, *path))
        noise = torch.rand(units.shape, generator=generator)
        return (units + noise).floor().clamp(-self.top, self.top)

    def codes(self, units: Tensor, role: Role) -> np.ndarray:
        """Returns one byte for each value."""
        # NaN becomes any whole number; the scale of the group is NaN, too, and decides.
        numbers = self.rounded(units, role).nan_to_num(0.0)
        array: np.ndarray = numbers.to(torch.int8).numpy()
        return array

    def units(self, encoded: Encoded, form: Form) -> Tensor:
        """Returns the numbers."""
        return array_in(encoded, "codes", np.int8, form.rows, form.width).float()


class StochasticInt8(Int8):
    """Like int8, and rounds up or down at random, so that the mean error is 0; `--wire.codec int8s`.

    The error is below one scale. The random numbers follow from the run's seed and the step.
    """

    @classmethod
    def at(cls, place: Place) -> StochasticInt8:
        """Returns a new codec with the run's seed."""
        return cls(place.seed)


class Int4(Int8):
    """Rounds to whole numbers from -7 to 7 times a scale for each 64 values; `--wire.codec int4`.

    Two numbers share a byte. The error is at most half a scale.

    Example:
        >>> from fedsplit.wire.packets import StepKey
        >>> role = Role("activation", "up", StepKey(round=1, client=0, step=0))
        >>> Int4().encode(torch.ones(2, 64), role).nbytes  # 64 bytes of numbers and 4 of scales
        68
    """

    top = 7.0

    def codes(self, units: Tensor, role: Role) -> np.ndarray:
        """Returns half a byte for each value."""
        numbers = self.rounded(units, role).nan_to_num(0.0)
        return packed((numbers + 8).to(torch.uint8))

    def units(self, encoded: Encoded, form: Form) -> Tensor:
        """Returns the numbers."""
        return unpacked(encoded, form).float() - 8


class StochasticInt4(Int4):
    """Like int4, and rounds up or down at random, so that the mean error is 0; `--wire.codec int4s`."""

    @classmethod
    def at(cls, place: Place) -> StochasticInt4:
        """Returns a new codec with the run's seed."""
        return cls(place.seed)


class FewIntegers(Int8):
    """Rounds to whole numbers of at most LARGEST times a scale for each 64 values; `--wire.codec integers:LARGEST`.

    A byte holds as many numbers as fit, as the digits of a number in the base 2 LARGEST + 1. The error is at most half
    a scale.

    Example:
        >>> from fedsplit.wire.packets import StepKey
        >>> role = Role("activation", "up", StepKey(round=1, client=0, step=0))
        >>> FewIntegers(1).encode(torch.ones(2, 64), role).nbytes  # 26 bytes of five numbers each, and 4 of scales
        30
    """

    def __init__(self, largest: int) -> None:
        """Prepares for rounding to the nearest number.

        Args:
            largest: Largest number, from 1 to 7.
        """
        super().__init__()
        self.top = float(largest)
        self._base = 2 * largest + 1
        self._digits = digits_of_a_byte(self._base)

    @classmethod
    def at(cls, place: Place) -> FewIntegers:
        """Returns a new codec with the parameter."""
        assert place.parameter is not None
        return cls(int(place.parameter))

    def codes(self, units: Tensor, role: Role) -> np.ndarray:
        """Returns bytes of several numbers each."""
        numbers = self.rounded(units, role).nan_to_num(0.0)
        digits = (numbers + self.top).to(torch.uint8).flatten()
        digits = functional.pad(digits, (0, -digits.numel() % self._digits)).view(-1, self._digits)
        codes = torch.zeros(len(digits), dtype=torch.uint8)
        for place in range(self._digits):
            # As many digits as fit into a byte, so that no sum is above 255.
            codes += digits[:, place] * self._base**place
        array: np.ndarray = codes.numpy()
        return array

    def units(self, encoded: Encoded, form: Form) -> Tensor:
        """Returns the numbers."""
        codes = array_in(encoded, "codes", np.uint8, -(-form.count // self._digits))
        columns = [codes // self._base**place % self._base for place in range(self._digits)]
        digits = torch.stack(columns, 1).flatten()
        return digits[: form.count].view(form.rows, form.width).float() - self.top


def digits_of_a_byte(base: int) -> int:
    """Returns how many digits of a base fit into a byte.

    Example:
        >>> digits_of_a_byte(3), digits_of_a_byte(7)
        (5, 2)
    """
    return next(count for count in range(8, 0, -1) if base**count <= 256)


class Float8(Grouped):
    """Rounds to a float of 8 bits times a scale for each row."""

    group: int | None = None
    dtype: torch.dtype

    def codes(self, units: Tensor, role: Role) -> np.ndarray:
        """Returns the bits of the floats."""
        # Beyond the largest number, some versions of torch make NaN and others the largest number.
        floats = units.clamp(-self.top, self.top).to(self.dtype)
        bits: np.ndarray = floats.view(torch.uint8).numpy()
        return bits

    def units(self, encoded: Encoded, form: Form) -> Tensor:
        """Returns the floats."""
        bits = array_in(encoded, "codes", np.uint8, form.rows, form.width)
        return bits.view(self.dtype).float()


class Float8E4M3(Float8):
    """Rounds to floats with 3 bits of mantissa, up to 448 times a scale for each row; `--wire.codec fp8_e4m3`.

    The error is at most a 16th of the value, or 2^-10 of the scale for small values.
    """

    dtype = torch.float8_e4m3fn
    top = 448.0


class Float8E5M2(Float8):
    """Rounds to floats with 2 bits of mantissa, up to 57344 times a scale for each row; `--wire.codec fp8_e5m2`.

    The error is at most an 8th of the value, or 2^-17 of the scale for small values.
    """

    dtype = torch.float8_e5m2
    top = 57344.0


def packed(codes: Tensor) -> np.ndarray:
    """Returns numbers from 0 to 15 in half a byte each.

    Example:
        >>> packed(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist()
        [33, 15]
    """
    flat = functional.pad(codes.flatten(), (0, codes.numel() % 2))
    low, high = flat.view(-1, 2).unbind(1)
    array: np.ndarray = (low | (high << 4)).numpy()
    return array


def unpacked(encoded: Encoded, form: Form) -> Tensor:
    """Returns the numbers from 0 to 15 of an encoded tensor (rows, width).

    Raises:
        MalformedPacket: The codes have another number or type.
    """
    codes = array_in(encoded, "codes", np.uint8, -(-form.count // 2))
    both = torch.stack([codes & 15, codes >> 4], 1).flatten()
    return both[: form.count].view(form.rows, form.width)
