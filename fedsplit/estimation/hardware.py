"""Named devices and the operations that they sustain in training, for an estimate of seconds.

The figures are assumptions, each from a published peak and a stated share of it. `docs/estimate.md` has the sources. A
number in place of a name is a device by its sustained TFLOP/s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedsplit.errors import InputError, shortened

UTILIZATION = 0.4
"""Share of a GPU's peak that training sustains; 38 to 43 % in the pre-training of Llama 3 (2407.21783, table 4)."""


@dataclass(frozen=True)
class Hardware:
    """A device that computes.

    Attributes:
        name: Name of the device, or its number of TFLOP/s.
        fp32: Floating-point operations a second that are sustained in float32.
        narrow: The same in bfloat16 and float16.

    Example:
        >>> round(HARDWARE["a100"].speed("bf16") / 1e12, 1)
        124.8
    """

    name: str
    fp32: float
    narrow: float

    def speed(self, dtype: str) -> float:
        """Returns the sustained operations a second.

        Args:
            dtype: Type of computation, a value of the setting `dtype`.
        """
        return self.fp32 if dtype == "fp32" else self.narrow


def _gpu(name: str, fp32: float, narrow: float) -> Hardware:
    """Returns a GPU, given the peaks in TFLOP/s."""
    return Hardware(name, UTILIZATION * fp32 * 1e12, UTILIZATION * narrow * 1e12)


HARDWARE: Mapping[str, Hardware] = {
    # Assumptions: a core at 3 GHz with two 256-bit units peaks at 96 GFLOP/s in float32, and sustains a third. 16-bit
    # types are no faster without special instructions.
    "cpu-core": Hardware("cpu-core", 3e10, 3e10),
    "phone": Hardware("phone", 5e10, 5e10),  # the large cores of a recent phone, which slow down as it warms
    "laptop": Hardware("laptop", 1.5e11, 1.5e11),  # eight cores that share power and memory: five free ones
    # Peaks by the makers' data sheets, dense: float32 without tensor cores, and 16 bits with float32 sums.
    "t4": _gpu("t4", 8.1, 65.0),
    "rtx4090": _gpu("rtx4090", 82.6, 165.2),
    "a100": _gpu("a100", 19.5, 312.0),
    "h100": _gpu("h100", 67.0, 989.4),
}
"""The devices by name."""


def hardware_named(text: str, flag: str) -> Hardware:
    """Returns a device by its name, or by its sustained TFLOP/s.

    Args:
        text: A name, or a number.
        flag: The flag, for errors.

    Raises:
        InputError: The text is neither a name nor a number above 0.

    Example:
        >>> hardware_named("2.5", "--client.hardware").speed("fp32")
        2500000000000.0
        >>> hardware_named("toaster", "--client.hardware")
        Traceback (most recent call last):
        fedsplit.errors.InputError: --client.hardware: toaster is not possible; allowed: cpu-core | phone | laptop | \
t4 | rtx4090 | a100 | h100, or the TFLOP/s that the device sustains, such as 2.5
    """
    if text in HARDWARE:
        return HARDWARE[text]
    try:
        teraflops = float(text)
    except ValueError:
        teraflops = math.nan
    # NaN fails the comparison.
    if 0 < teraflops < 1e9:
        return Hardware(f"{teraflops:g} TFLOP/s", teraflops * 1e12, teraflops * 1e12)
    allowed = f"{' | '.join(HARDWARE)}, or the TFLOP/s that the device sustains, such as 2.5"
    raise InputError(f"{flag}: {shortened(text)} is not possible; allowed: {allowed}")
