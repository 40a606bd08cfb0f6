"""Numbers of the examples in a packet, by which codecs know a text again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsplit.wire.casting import EXACT
from fedsplit.wire.encoded import Encoded, MalformedPacket
from fedsplit.wire.packets import EXAMPLES, Packet


def encoded_examples(numbers: Sequence[int]) -> Encoded:
    """Returns numbers of examples, for a packet.

    The numbers count the sequences of a client's data. They say nothing about the texts.

    Example:
        >>> encoded_examples([7, 3]).nbytes
        8
    """
    return EXACT.encode(torch.tensor(numbers, dtype=torch.int32))


def examples_of(packet: Packet) -> tuple[int, ...]:
    """Returns the numbers of the examples in a packet; empty for a packet without them.

    Raises:
        MalformedPacket: The numbers are no whole numbers from 0 in a row.
    """
    if EXAMPLES not in packet.tensors:
        return ()
    numbers = EXACT.decode(packet.tensors[EXAMPLES])
    if numbers.dtype != torch.int32 or numbers.ndim != 1 or bool((numbers < 0).any()):
        raise MalformedPacket(f"numbers of examples are {tuple(numbers.shape)} of {numbers.dtype}")
    return tuple(numbers.tolist())
