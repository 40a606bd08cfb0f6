"""Answers: each step gets its own tensors, with its role, and the bytes both ways are counted."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsplit.trunk.answers import Answers
from fedsplit.trunk.status import Bytes, Traffic
from fedsplit.wire.casting import EXACT, Raw
from fedsplit.wire.codecs import Role
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.packets import Packet, StepKey


class Noting(Raw):
    """A codec that notes the roles."""

    def __init__(self) -> None:
        self.roles: list[Role] = []

    def encode(self, tensor: Tensor, role: Role | None = None) -> Encoded:
        assert role is not None
        self.roles.append(role)
        return super().encode(tensor, role)


KEYS = [StepKey(1, client, 0) for client in (4, 7)]
UP = [Packet(key, {"hidden": EXACT.encode(torch.zeros(5))}, training=key.client == 4) for key in KEYS]


def test_hidden_states_go_to_their_own_step_and_are_counted() -> None:
    codec, traffic = Noting(), Traffic()
    hidden = {key: torch.full((2,), float(key.client)) for key in reversed(KEYS)}
    answers = Answers(codec, traffic).with_hidden(traffic.prompt, UP, hidden, {})
    assert [EXACT.decode(answer.tensors["hidden"])[0].item() for answer in answers] == [4.0, 7.0]
    assert [answer.training for answer in answers] == [True, False]
    assert codec.roles == [Role("activation", "down", key, key.client == 4) for key in KEYS]
    assert traffic == Traffic(prompt=Bytes(up=2 * 20, down=2 * 8))


def test_gradients_cross_in_the_type_of_the_hidden_states_and_not_at_all_where_none_are_wanted() -> None:
    codec, traffic = Noting(), Traffic()
    inputs = {key: torch.zeros(2, dtype=torch.float16) for key in KEYS}
    with_one, without = Answers(codec, traffic).with_gradients(UP, {KEYS[0]: torch.ones(2)}, inputs)
    assert not without.tensors and with_one.nbytes == 2 * 2
    assert codec.roles == [Role("gradient", "down", KEYS[0], True, torch.float16)]
    assert traffic == Traffic(gradient=Bytes(up=2 * 20, down=4))
