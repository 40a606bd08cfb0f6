"""Numbers of examples in a packet."""

from __future__ import annotations

import numpy as np
import pytest

from fedsplit.wire.encoded import Encoded, MalformedPacket
from fedsplit.wire.example_numbers import encoded_examples, examples_of
from fedsplit.wire.packets import EXAMPLES, Packet, StepKey

KEY = StepKey(1, 0, 0)


def test_numbers_return_from_a_packet() -> None:
    assert examples_of(Packet(KEY, {EXAMPLES: encoded_examples([5, 0, 5])})) == (5, 0, 5)
    assert examples_of(Packet(KEY)) == ()


@pytest.mark.parametrize("array", [np.array([-1], np.int32), np.zeros((1, 1), np.int32), np.zeros(1, np.float32)])
def test_what_are_no_numbers_is_refused(array: np.ndarray) -> None:
    encoded = Encoded({"values": array}, {"dtype": array.dtype.name})
    with pytest.raises(MalformedPacket):
        examples_of(Packet(KEY, {EXAMPLES: encoded}))
