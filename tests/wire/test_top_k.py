"""The largest values of each row, and what error feedback adds later."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsplit.wire.codecs import Role, make_codec
from fedsplit.wire.encoded import Encoded, MalformedPacket
from fedsplit.wire.packets import StepKey


def role_of(step: int, kind: str = "gradient") -> Role:
    return Role(kind, "up", StepKey(1, 0, step))  # type: ignore[arg-type]


def test_each_row_sends_its_largest_values() -> None:
    tensor = torch.tensor([[1.0, -5.0, 3.0, 0.5], [0.1, 0.2, 0.0, -0.3]])
    codec = make_codec("topk:0.5")
    decoded = codec.decode(codec.encode(tensor, role_of(0)), role_of(0))
    assert torch.equal(decoded, torch.tensor([[0.0, -5.0, 3.0, 0.0], [0.0, 0.2, 0.0, -0.3]]))


@pytest.mark.parametrize("chain", ["topk:0.1", "topk:0.1,int4"])
def test_what_error_feedback_held_back_crosses_in_the_next_steps(chain: str) -> None:
    """All steps together send what was to be sent, but for the last residual; also where values are rounded."""
    sender, receiver = make_codec(chain), make_codec(chain)
    gradients = torch.randn(60, 3, 20, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(3, 20)
    for step, gradient in enumerate(gradients):
        total += receiver.decode(sender.encode(gradient, role_of(step)), role_of(step))
    held_back = sender.state()[0]["gradient/up/0/0"]
    assert torch.allclose(gradients.sum(0) - total, held_back, atol=1e-4)


def test_hidden_states_have_no_residual_and_a_residual_of_another_shape_is_dropped() -> None:
    codec = make_codec("topk:0.5")
    codec.encode(torch.ones(2, 4), role_of(0, "activation"))
    assert not codec.state()
    codec.encode(torch.ones(2, 4), role_of(0))
    encoded = codec.encode(torch.ones(1, 4), role_of(1))
    assert encoded.array("kept.values").tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("places", [np.array([[4]], np.int8), np.array([[-1]], np.int8), np.array([[0, 1]], np.int8)])
def test_a_place_outside_of_the_row_is_refused(places: np.ndarray) -> None:
    encoded = make_codec("topk:0.25").encode(torch.ones(1, 4), role_of(0))
    with pytest.raises(MalformedPacket):
        make_codec("topk:0.25").decode(Encoded({**encoded.arrays, "places": places}, encoded.header), role_of(0))


def test_a_bitmap_with_another_number_of_places_is_refused() -> None:
    encoded = make_codec("topk:0.5").encode(torch.ones(1, 16), role_of(0))
    assert encoded.array("places").dtype == np.uint8
    places = np.full_like(encoded.array("places"), 255)
    with pytest.raises(MalformedPacket, match="not 8 places"):
        make_codec("topk:0.5").decode(Encoded({**encoded.arrays, "places": places}, encoded.header), role_of(0))
