"""Each tensor has the codec of its role, and the states of two sides do not mix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from torch import Tensor

from fedsplit.wire.by_role import ByRole
from fedsplit.wire.casting import BFloat16, Raw
from fedsplit.wire.codecs import Role
from fedsplit.wire.packets import StepKey

VALUE = torch.tensor([1.001])


class Stateful(Raw):
    """A codec with a state that tests set."""

    def __init__(self) -> None:
        self.states: Mapping[int, Mapping[str, Tensor]] = {}

    def state(self) -> Mapping[int, Mapping[str, Tensor]]:
        return self.states

    def restore(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        self.states = states


@pytest.mark.parametrize("kind", ["activation", "gradient"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_tensor_is_encoded_and_decoded_by_the_codec_of_its_role(
    kind: Literal["activation", "gradient"], direction: Literal["up", "down"]
) -> None:
    places = [(one, way) for one in ("activation", "gradient") for way in ("up", "down")]
    codecs = {place: BFloat16() if place == (kind, direction) else Raw() for place in places}
    codec = ByRole(codecs, codecs[kind, direction], "below")
    for one, way in places:
        role = Role(one, way, StepKey(1, 0, 0))  # type: ignore[arg-type]
        is_exact = bool(codec.decode(codec.encode(VALUE, role), role) == VALUE)
        assert is_exact == ((one, way) != (kind, direction))


def test_each_side_gets_back_its_own_state_alone() -> None:
    inner = {side: Stateful() for side in ("below", "above")}
    codecs = {side: ByRole({}, codec, side) for side, codec in inner.items()}
    inner["below"].states = {3: {"residual": torch.ones(1)}}
    inner["above"].states = {3: {"residual": torch.zeros(1)}, 4: {"residual": torch.ones(2)}}
    joined: dict[int, dict[str, Tensor]] = {}
    for codec in codecs.values():
        for client, state in codec.state().items():
            joined.setdefault(client, {}).update(state)
    before = {side: codec.states for side, codec in inner.items()}
    for side, codec in codecs.items():
        codec.restore(joined)
        assert inner[side].states == before[side]
