"""What crosses a boundary is counted and checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsplit.updates import Adapters, Encoded, Layer, Packet, RefusedUpdate, StepKey


@pytest.fixture
def adapters() -> Adapters:
    tensors = {"l.lora_A.weight": torch.ones(2, 3), "l.lora_B.weight": torch.zeros(4, 2)}
    return Adapters(tensors, {"l": Layer(scaling=2.0, transposed=False)})


def test_bytes_are_read_off_the_data(adapters: Adapters) -> None:
    packet = Packet(StepKey(1, 0, 0), {"hidden": Encoded(np.zeros((2, 3), np.float32), "float32")})
    assert packet.nbytes == 24
    assert adapters.nbytes == (6 + 8) * 4


def test_factors_of_a_layer(adapters: Adapters) -> None:
    a, b = adapters.factors("l")
    assert (a.shape, b.shape) == ((2, 3), (4, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("l.lora_A.weight"), "ann sent other layers"),
        (lambda t: t.update(x=torch.ones(1)), "ann sent other layers than it was given: x"),
        (lambda t: t.update({"l.lora_A.weight": torch.ones(1, 3)}), r"ann sent l.lora_A.weight with shape \(1, 3\)"),
        (lambda t: t.update({"l.lora_B.weight": torch.full((4, 2), torch.nan)}), "ann sent NaN .* l.lora_B"),
        (lambda t: t.update({"l.lora_B.weight": torch.full((4, 2), torch.inf)}), "ann sent NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(adapters: Adapters, change, message: str) -> None:
    tensors = dict(adapters.tensors)
    adapters.check_fits(tensors, "ann")
    change(tensors)
    with pytest.raises(RefusedUpdate, match=message):
        adapters.check_fits(tensors, "ann")
