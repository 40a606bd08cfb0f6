"""What crosses at a step is counted off the data."""

from __future__ import annotations

import numpy as np

from fedsplit.wire.casting import array_as
from fedsplit.wire.packets import Packet, StepKey


def test_bytes_are_read_off_the_data() -> None:
    tensors = {"hidden": array_as(np.zeros((2, 3), np.float32), "float32"), "mask": array_as(np.ones(5, bool), "bool")}
    assert Packet(StepKey(1, 0, 0), tensors).nbytes == 24 + 5


def test_what_came_before_is_smaller() -> None:
    places = [StepKey(*key).place for key in ((1, 0, 5), (1, 0, 0, 1), (1, 0, 1, 1), (2, 0, 0))]
    assert places == sorted(places)
    first, second = (StepKey(1, 0, 5, batch=batch) for batch in (0, 1))
    assert first.place < second.place < StepKey(1, 0, 6).place and first.turn == second.turn


def test_the_last_part_of_a_step_ends_it() -> None:
    keys = [StepKey(1, 0, 0, batch=batch, micro=micro) for batch in range(3) for micro in range(2)]
    packets = [Packet(key, micros=2, batches=3) for key in keys]
    assert [packet.ends for packet in packets] == [False] * 5 + [True]
    assert {packet.parts for packet in packets} == {6}
    assert {packet.clipping_key for packet in packets} == {StepKey(1, 0, 0, batch=2, micro=2)}
