"""Each tensor has the codec of its role, and the states of roles do not mix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from torch import Tensor

from fedsplit.settings.sections import WireSettings
from fedsplit.wire.by_role import ByRole, codec_of
from fedsplit.wire.casting import BFloat16, Raw
from fedsplit.wire.codecs import Role
from fedsplit.wire.delta import Delta
from fedsplit.wire.packets import StepKey

VALUE = torch.tensor([1.001])
ROLES = [(kind, direction) for kind in ("activation", "gradient") for direction in ("up", "down")]


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
    codecs = {role: BFloat16() if role == (kind, direction) else Raw() for role in ROLES}
    codec = ByRole(codecs)
    for one, way in ROLES:
        role = Role(one, way, StepKey(1, 0, 0))  # type: ignore[arg-type]
        is_exact = bool(codec.decode(codec.encode(VALUE, role), role) == VALUE)
        assert is_exact == ((one, way) != (kind, direction))


def test_each_role_gets_back_its_own_state_alone() -> None:
    """Also where the states of the stages of a trunk are joined, and each stage gets all of them."""
    up, down = Stateful(), Stateful()
    below = ByRole({("activation", "up"): up, ("gradient", "down"): down})
    above = ByRole({("activation", "down"): Stateful()})
    up.states = {3: {"activation/up/a": torch.ones(1)}}
    down.states = {3: {"gradient/down/a": torch.zeros(1)}, 4: {"gradient/down/b": torch.ones(2)}}
    joined = below.state()
    assert {client: sorted(state) for client, state in joined.items()} == {
        3: ["activation/up/a", "gradient/down/a"],
        4: ["gradient/down/b"],
    }
    before = up.states, down.states
    below.restore(joined)
    above.restore(joined)
    assert (up.states, down.states) == before
    assert not above.state()


def test_the_settings_name_the_codec_of_each_role_and_share_the_cache() -> None:
    settings = WireSettings(codec="delta,int8", gradient_up="bf16", gradient_down="raw", cache="1MB")
    codec = codec_of(settings, seed=0)
    kinds = {role: type(inner) for role, inner in codec.codecs.items()}
    assert kinds == dict(zip(ROLES, [Delta, Delta, BFloat16, Raw], strict=True))
    assert codec.needs_examples and not codec_of(WireSettings(), seed=0).needs_examples
    caches = [inner._cache for inner in codec.codecs.values() if isinstance(inner, Delta)]
    assert [cache._budget for cache in caches] == [500_000] * 2
