"""What crosses at a step is counted off the data."""

from __future__ import annotations

import numpy as np

from fedsplit.packets import Encoded, Packet, StepKey


def test_bytes_are_read_off_the_data() -> None:
    tensors = {"hidden": Encoded(np.zeros((2, 3), np.float32), "float32"), "mask": Encoded(np.ones(5, bool), "bool")}
    assert Packet(StepKey(1, 0, 0), tensors).nbytes == 24 + 5


def test_what_came_before_is_smaller() -> None:
    places = [StepKey(*key).place for key in ((1, 0, 5), (1, 0, 0, 1), (1, 0, 1, 1), (2, 0, 0))]
    assert places == sorted(places)
