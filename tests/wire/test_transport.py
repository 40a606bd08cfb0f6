"""Transports: a packet that one leaves unanswered is sent by the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import StaleStep
from fedsplit.wire.transport import FallbackTransport, TrunkLost, Unanswered

PACKET = Packet(StepKey(1, 0, 0))


class Recorder:
    """A transport that answers by its name, or raises an error where it sends or where it answers."""

    def __init__(self, name: str, sending: Exception | None = None, answering: Exception | None = None) -> None:
        self.answer = Packet(StepKey(1, 0, 0, run=name))
        self.sending, self.answering = sending, answering
        self.sent = self.forgot = 0

    def send(self, packet: Packet) -> Callable[[], Packet]:
        self.sent += 1
        if self.sending:
            raise self.sending

        def wait() -> Packet:
            if self.answering:
                raise self.answering
            return self.answer

        return wait

    def forget(self) -> None:
        self.forgot += 1


def test_the_second_is_not_asked_while_the_first_answers() -> None:
    first, second = Recorder("first"), Recorder("second")
    assert FallbackTransport(first, second).send(PACKET)() is first.answer
    assert (first.sent, second.sent) == (1, 0)


@pytest.mark.parametrize("where", ["sending", "answering"])
def test_what_the_first_leaves_unanswered_the_second_is_asked(where: str) -> None:
    second = Recorder("second")
    assert FallbackTransport(Recorder("first", **{where: Unanswered("broken")}), second).send(PACKET)() is second.answer


def test_a_refusal_is_an_answer() -> None:
    second = Recorder("second")
    answer = FallbackTransport(Recorder("first", answering=StaleStep("no")), second).send(PACKET)
    with pytest.raises(StaleStep):
        answer()
    assert second.sent == 0


def test_a_trunk_that_neither_reaches_is_lost() -> None:
    broken = FallbackTransport(Recorder("first", Unanswered("broken")), Recorder("second", TrunkLost("gone")))
    with pytest.raises(TrunkLost, match="gone"):
        broken.send(PACKET)


def test_both_forget() -> None:
    first, second = Recorder("first"), Recorder("second")
    FallbackTransport(first, second).forget()
    assert (first.forgot, second.forgot) == (1, 1)
