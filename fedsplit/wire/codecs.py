"""Tensor codecs: what a hidden state or a gradient looks like on the wire."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedsplit.wire.packets import Encoded, MalformedPacket
from fedsplit.wire.scaling import scale_to

with warnings.catch_warnings():
    # torch warns once a process that it cannot protect an array from being written to; nobody here writes to one.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"0", np.uint8))

_FULL = 2.0**15
"""What the largest element of a gradient is scaled to at most, half of what float16 can hold."""

_NARROWED: Mapping[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.bfloat16: (torch.int16,),
    torch.float16: (torch.int16,),
    torch.float32: (torch.int16, torch.float16),
    torch.float64: (torch.int16, torch.float16),
}
"""By type: the other types of arrays that an encoder makes of it. The bits of bfloat16 are sent as int16."""


@dataclass(frozen=True)
class Codec:
    """Encodes tensors into arrays whose bytes are what crosses, and decodes them.

    Attributes:
        name: As in the settings.
        narrow: The type values are rounded to before they cross; None sends them as they are.
    """

    name: str
    narrow: torch.dtype | None = None

    def encode(self, tensor: Tensor) -> Encoded:
        """A tensor of any shape to what is sent; copies only where it must."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        tensor = tensor.detach()
        if self.narrow is not None and tensor.is_floating_point():
            tensor = tensor.to(self.narrow)
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.int16)  # numpy has no bfloat16; the bits cross as integers
        return Encoded(tensor.contiguous().cpu().numpy(), dtype)

    def encode_gradient(self, gradient: Tensor, hidden: torch.dtype) -> Encoded:
        """The gradient of hidden states, in the type that they crossed in.

        Args:
            gradient: In their type; in float32 where that is float16, in which it crosses times a power of two.
            hidden: Their type.
        """
        if hidden != torch.float16:
            return self.encode(gradient)
        scale = scale_to(_FULL, gradient)
        return replace(self.encode((gradient * scale).to(hidden)), dtype="float32", scale=scale)

    def decode(self, encoded: Encoded) -> Tensor:
        """What was sent to a tensor of the sender's shape and type; a view of it where that is possible.

        What came from elsewhere may lie in memory that must not be written to: use the tensor, do not change it.

        Raises:
            MalformedPacket: Values of that type are not sent as such an array: nothing is cast that was not cast by
                an encoder.
        """
        tensor, dtype = torch.from_numpy(encoded.data), getattr(torch, encoded.dtype, None)
        if not isinstance(dtype, torch.dtype) or tensor.dtype not in {dtype, *_NARROWED.get(dtype, ())}:
            raise MalformedPacket(f"an array of {tensor.dtype} cannot stand for values of type {encoded.dtype[:40]}")
        if tensor.dtype == torch.int16 and dtype.is_floating_point:
            tensor = tensor.view(torch.bfloat16)
        tensor = tensor.to(dtype)
        return tensor if encoded.scale == 1 else tensor / encoded.scale


EXACT = Codec("raw")
"""For what is small and must cross as it is, whatever the run's codec."""


_CODECS: dict[str, Callable[[], Codec]] = {
    "raw": lambda: Codec("raw"),
    "bf16": lambda: Codec("bf16", torch.bfloat16),
}


def make_codec(name: str) -> Codec:
    """The codec of that name; one of `fedsplit.allowed.CODECS`."""
    return _CODECS[name]()
