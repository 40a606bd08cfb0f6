"""A trunk that dies when it is told to, for trials of recovery."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

from fedsplit.trunk.local import LocalTrunk
from fedsplit.trunk.port import Control
from fedsplit.wire.packets import Packet
from fedsplit.wire.transport import PendingAnswer, TrunkLost


class MortalTrunk(LocalTrunk):
    """A trunk that dies before or after it has done something, and is gone from then on.

    Attributes:
        deaths: Numbers of the calls at which a trunk dies, of all calls to all trunks of a run; a half means that the
            call is carried out, and its answer lost.
        calls: Number of calls so far.
        handled: Names of what was called.
    """

    deaths: ClassVar[set[float]] = set()
    calls: ClassVar[Iterator[int]] = itertools.count()
    handled: ClassVar[list[str]] = []

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet; the trunk may die before it comes, or before its answer is there."""
        kind = "gradient" if "gradient" in packet.tensors else "forward"
        number = self._count(f"{kind} of {'training' if packet.training else 'evaluation'}")
        wait = super().send(packet)

        def dies() -> Packet:
            answer = wait()
            self._die_at(number + 0.5)
            return answer

        return dies

    def control(self, message: Control[Any]) -> Any:
        """Carries out a control message; the trunk may die before or after."""
        number = self._count(type(message).__name__)
        reply = super().control(message)
        self._die_at(number + 0.5)
        return reply

    def _count(self, name: str) -> int:
        number = next(self.calls)
        self.handled.append(name)
        self._die_at(number)
        return number

    def _die_at(self, point: float) -> None:
        if point in self.deaths:
            self.deaths.discard(point)
            self.close()
            raise TrunkLost("the trunk's process is gone (killed on purpose)")

    @classmethod
    def reset(cls, deaths: set[float]) -> None:
        """Sets the calls at which the trunks of the next run die."""
        cls.deaths = deaths
        cls.calls = itertools.count()
        cls.handled = []
