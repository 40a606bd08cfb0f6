"""A trunk in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedsplit.adaptation.run_adapters import adapt, bare_parts
from fedsplit.config import Config
from fedsplit.trunk.dispatch import Dispatcher
from fedsplit.trunk.memory import peak_memory, resident_memory
from fedsplit.trunk.server import TrunkServer
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import Packet


class LocalTrunk:
    """A dispatcher and its trunk with what their actor and handle add; time passes only when nothing else can."""

    def __init__(self, config: Config, run: str = "") -> None:
        (part,) = bare_parts(config, ["trunk"])
        adapt(part, config)
        self.now = 0.0
        codec, schedule = make_codec(config.wire.codec), config.trunk.schedule
        clock, train, seed = lambda: self.now, config.train, config.seed
        self.server = TrunkServer(
            part, codec, schedule, train, seed, run=run, incarnation="first", lease=config.trunk.lease, clock=clock
        )
        self.dispatcher = Dispatcher(self.server, config.trunk, clock)
        self.begin, self.leave, self.end_round = self.dispatcher.begin, self.dispatcher.leave, self.dispatcher.end_round
        self.fold, self.unfold, self.commit = self.server.fold, self.server.unfold, self.server.commit
        for method in ("assign", "copies", "read", "write", "moments", "restore"):
            setattr(self, method, getattr(self.server.learners, method))

    def send(self, packet: Packet) -> Callable[[], Packet]:
        """Submits a packet, and returns a function that waits for the answer."""
        answers: list[Any] = []
        self.dispatcher.submit(packet, answers.append)

        def wait() -> Packet:
            while not answers:
                if not self.dispatcher.advance():
                    wakes = self.dispatcher.wakes_at()
                    assert wakes is not None, "nothing will ever answer"
                    self.now = max(self.now, wakes)
            if isinstance(answers[0], Exception):
                raise answers[0]
            return answers[0]

        return wait

    def status(self) -> dict[str, Any]:
        """Returns what `TrunkHandle.status` does."""
        return {
            "incarnation": "first",
            "least_memory": 0,
            "traffic": dict(self.server.traffic),
            "peak_memory": peak_memory(),
            "resident_memory": resident_memory(),
            "pending": len(self.server.steps),
            "parameters": self.server.count(),
        }
