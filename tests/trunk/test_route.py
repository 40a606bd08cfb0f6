"""The way of each kind of packet through the stages of a trunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fedsplit.trunk.route import travel, way_of
from fedsplit.wire.casting import EXACT
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.transport import PendingAnswer, TrunkLost

KEY = StepKey(1, 0, 0, run="run")


def tensors(**values: float) -> dict[str, Any]:
    return {name: EXACT.encode(torch.tensor(value, dtype=torch.float64)) for name, value in values.items()}


def values_of(packet: Packet) -> dict[str, float]:
    return {name: float(EXACT.decode(tensor)) for name, tensor in packet.tensors.items()}


class Stage:
    """Answers with given tensors, and remembers what it was asked."""

    def __init__(self, log: list[tuple[str, dict[str, float], bool]], name: str, **answer: float) -> None:
        self.log, self.name, self.answer = log, name, answer
        self.wait = answer.pop("wait", 0.0)

    def send(self, packet: Packet) -> PendingAnswer:
        self.log.append((self.name, values_of(packet), packet.wants_gradient))
        return lambda: Packet(packet.key, tensors(**self.answer), wait=self.wait)


def sent(
    packet: Packet, own: Mapping[str, float], rest: Mapping[str, float], learns: bool = True
) -> tuple[Packet, list[tuple[str, dict[str, float], bool]]]:
    log: list[tuple[str, dict[str, float], bool]] = []
    stages = Stage(log, "own", **own), Stage(log, "rest", **rest)
    return travel(way_of(packet, learns), stages[0].send, stages[1].send)(), log


@pytest.mark.parametrize(("learns", "wants"), [(True, False), (False, False), (False, True)])
def test_hidden_states_go_up_with_mask_and_sums_and_ask_for_a_gradient_where_a_stage_needs_it(
    learns: bool, wants: bool
) -> None:
    packet = Packet(KEY, tensors(hidden=1, mask=7, routers=2), wants_gradient=wants)
    answer, log = sent(packet, {"hidden": 3, "routers": 4, "random": 5}, {"hidden": 6, "routers": 8}, learns)
    assert values_of(answer) == {"hidden": 6, "routers": 8}
    assert log == [
        ("own", {"hidden": 1, "mask": 7, "routers": 2}, wants),
        ("rest", {"hidden": 3, "routers": 4, "random": 5, "mask": 7}, learns or wants),
    ]


def test_gradients_come_down_and_norms_add_up() -> None:
    packet = Packet(KEY, tensors(gradient=1, routers=2), wants_gradient=False)
    answer, log = sent(packet, {"norm": 4}, {"gradient": 3, "norm": 5})
    assert values_of(answer) == {"norm": 9}
    assert log == [
        ("rest", {"gradient": 1, "routers": 2}, True),
        ("own", {"gradient": 3, "routers": 2}, False),
    ]


def test_a_coefficient_reaches_every_stage_and_a_full_stage_stops_an_admission() -> None:
    _, log = sent(Packet(KEY, tensors(coefficient=0.5)), {}, {})
    assert [name for name, *_ in log] == ["rest", "own"]
    _, log = sent(Packet(KEY, shape=(1, 2, 3)), {}, {})
    assert [name for name, *_ in log] == ["own", "rest"]
    answer, log = sent(Packet(KEY, shape=(1, 2, 3)), {"wait": 0.1}, {})
    assert [name for name, *_ in log] == ["own"] and answer.wait == 0.1


def test_the_first_question_is_sent_at_once_and_an_error_is_raised_where_it_is_waited_for() -> None:
    log: list[tuple[str, dict[str, float], bool]] = []

    def lost(packet: Packet) -> PendingAnswer:
        raise TrunkLost("gone")

    wait = travel(way_of(Packet(KEY, tensors(hidden=1)), True), Stage(log, "own", hidden=2).send, lost)
    assert len(log) == 1
    with pytest.raises(TrunkLost):
        wait()
