"""The port: each method sends its message, so that a door has to know no more than two."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch

from fedsplit.lowrank import LowRank
from fedsplit.trunk import port
from fedsplit.trunk.copies import Start
from fedsplit.trunk.port import Control, TrunkPort
from fedsplit.wire.packets import Packet

TENSORS = {"a": torch.ones(1)}
CHANGES = {"l": LowRank(torch.ones(2, 1), torch.ones(1, 2))}
STARTS = {3: Start(TENSORS)}

CALLS: dict[str, tuple[tuple[Any, ...], Control[Any]]] = {
    "begin": (([1, 0],), port.BeginGroup((1, 0))),
    "leave": ((4,), port.Leave(4)),
    "end_round": (([2],), port.EndRound((2,))),
    "assign": ((STARTS,), port.AssignCopies(STARTS)),
    "assign_again": ((3, STARTS[3]), port.AssignAgain(3, STARTS[3])),
    "copies": (([2],), port.ReadCopies((2,))),
    "read": ((), port.ReadAdapter()),
    "write": ((TENSORS, {1: TENSORS}), port.WriteAdapter(TENSORS, {1: TENSORS})),
    "fold": ((CHANGES,), port.Fold(CHANGES)),
    "unfold": ((), port.Unfold()),
    "commit": ((), port.Commit()),
    "moments": ((), port.ReadMoments()),
    "restore": ((TENSORS, {}), port.Restore(TENSORS, {})),
    "measure_step": ((), port.MeasureStep()),
    "take_trace": ((), port.TakeTrace()),
    "status": ((), port.ReadStatus()),
}


class Door(TrunkPort):
    """A door that remembers messages, and replies with them."""

    def send(self, packet: Packet) -> Any:
        raise NotImplementedError

    def control(self, message: Control[Any]) -> Any:
        self.message = message
        return message


@pytest.mark.parametrize("name", CALLS)
def test_each_method_sends_its_message_and_returns_the_reply(name: str) -> None:
    given, expected = CALLS[name]
    door = Door()
    reply = getattr(door, name)(*given)
    assert door.message == expected
    asks = name in ("end_round", "copies", "read", "moments", "measure_step", "take_trace", "status")
    assert reply is (door.message if asks else None)


def test_every_method_and_every_message_is_among_them() -> None:
    methods = {name for name, _ in inspect.getmembers(TrunkPort, inspect.isfunction) if not name.startswith("_")}
    assert methods - {"send", "control"} == CALLS.keys()
    assert {type(message) for _, message in CALLS.values()} == set(Control.__subclasses__())


def test_a_door_without_its_two_methods_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (TrunkPort,), {"send": lambda self, packet: None})()


@pytest.mark.parametrize("name", ["begin", "leave", "end_round", "status"])
def test_messages_can_be_sent_between_processes(name: str) -> None:
    _, message = CALLS[name]
    assert pickle.loads(pickle.dumps(message)) == message
