"""A trunk in the process of the caller, without threads: equal requests give equal results, bit for bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from fedsplit.clock import ManualClock
from fedsplit.settings.config import Config
from fedsplit.stages import StageMaker
from fedsplit.trunk.doors import JoinedTrunks
from fedsplit.trunk.port import Control, Reply, TrunkPort
from fedsplit.trunk.route import travel, way_of
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.service import Observer, TrunkService, load_service
from fedsplit.trunk.shard_group import LocalShards
from fedsplit.trunk.spans import Span, spans_of
from fedsplit.trunk.step_sync import Join, LocalPeers
from fedsplit.wire.packets import Packet
from fedsplit.wire.transport import PendingAnswer, TrunkLost


class LocalTrunk(TrunkPort):
    """A trunk that computes in the thread of the caller, when the caller waits for an answer.

    With one caller, the trunk has a manual clock. The clock stands still while there is work, and moves to the next
    deadline when all work is done. So no deadline depends on the speed of the machine. With several callers, the clock
    is the machine's; one waiting caller at a time computes, for all callers.

    The memory budget is ignored, since the trunk shares the process with the clients.

    Attributes:
        service: The service behind the door.
        server: The trunk of the service.
        rest: Stages of the trunk above this one; None above the last stage.
    """

    def __init__(
        self,
        config: Config,
        run: str = "",
        incarnation: str = "first",
        observers: Sequence[Observer] = (),
        stage: StageMaker | None = None,
        callers: int = 1,
        span: Span | None = None,
        rest: LocalTrunk | None = None,
        join: Join | None = None,
    ) -> None:
        """Loads the trunk's blocks.

        Args:
            config: Configuration of the run.
            run: Name of the run. Packets must carry the same name.
            incarnation: Identity of this start of the trunk. Packets must carry the same identity.
            observers: Observers of packets and answers.
            stage: Maker of the strategy's gradient stage for a client's copy; None for a strategy without a stage.
            callers: Number of threads that send packets.
            span: Blocks of one stage of the trunk; None for all blocks.
            rest: Stages of the trunk above this one; None above the last stage.
            join: Way of a replica to the adapter of all replicas; None for the first replica.
        """
        self.rest = rest
        self._learns = SCHEDULES[config.trunk.schedule].learns
        # With several callers, an idle thread cannot know whether a second thread is about to send.
        self._clock = ManualClock() if callers == 1 else None
        self._is_open = True
        # The service expects one deciding thread. Several callers take this role in turn.
        self._deciding = threading.Lock()
        self._news = threading.Condition()
        self._sent = 0
        self._shards = LocalShards(config) if config.trunk.tensor_parallel > 1 else None
        self.service: TrunkService = load_service(
            config,
            run,
            incarnation,
            stage=stage,
            observers=observers,
            clock=self._clock or time.monotonic,
            span=span,
            join=join,
            lead=self._shards.lead if self._shards else None,
        )
        self.server = self.service.server

    def send(self, packet: Packet) -> PendingAnswer:
        """Queues a packet. The computation begins when the caller waits for the answer."""
        if self.rest is None:
            return self._send(packet)
        return travel(way_of(packet, self._learns), own=self._send, rest=self.rest.send)

    def _send(self, packet: Packet) -> PendingAnswer:
        """Queues a packet for the blocks of this stage."""
        self._check_open()
        answers: list[Any] = []
        self.service.submit(packet, answers.append)
        self._tell()

        def wait() -> Packet:
            while not answers:  # the work may be a different client's, or only a part of this packet's
                self._work_for(packet, answers)
            answer = answers[0]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return wait

    def _work_for(self, packet: Packet, answers: Sequence[Any]) -> None:
        """Does one piece of work, or waits for a packet from a second thread."""
        sent = self._sent  # read before the look for work, so that a packet in between ends the wait below
        with self._deciding:
            self._check_open()
            if answers:  # computed by a second thread in the meantime
                return
            if self.service.work_now() or answers:  # a session is answered as its packet is taken
                self._tell()
                return
            wakes = self.service.wakes_at()
        if self._clock is not None:
            self._pass_time(packet, wakes)
            return
        with self._news:
            timeout = None if wakes is None else max(0.0, wakes - time.monotonic())
            self._news.wait_for(lambda: self._sent != sent, timeout)

    def _tell(self) -> None:
        """Wakes the waiting threads after a new packet, a new answer or the end of the trunk."""
        with self._news:
            self._sent += 1
            self._news.notify_all()

    def _pass_time(self, packet: Packet, wakes: float | None) -> None:
        """Moves the clock to the next deadline.

        Raises:
            RuntimeError: No deadline is set. The answer depends on a packet that only this thread could send.
        """
        assert self._clock is not None
        if wakes is None:
            raise RuntimeError(f"{packet.key} waits for another client, which this thread would have to play")
        self._clock.advance_to(wakes)

    def control(self, message: Control[Reply]) -> Reply:
        """Carries out a control message, after all earlier packets and messages are queued."""
        replies: list[Any] = []
        with self._deciding:
            self._check_open()
            self.service.request(message, replies.append)
            # Taken at once: no thread would carry out the message if all other callers were idle.
            self.service.take_requests()
        self._tell()
        reply = replies[0]
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> None:
        """Ends the trunk. Every later call raises `TrunkLost`."""
        self._is_open = False
        if self._shards is not None:
            self._shards.close()
        self._tell()

    def _check_open(self) -> None:
        if not self._is_open:
            raise TrunkLost("the trunk of this process was closed")


def load_trunks(
    config: Config, run: str, incarnation: str, stage: StageMaker | None = None, callers: int = 1
) -> list[list[LocalTrunk]]:
    """Loads all trunks of a run: for each replica its stages, from the bottom to the top.

    Args:
        config: Configuration of the run.
        run: Name of the run. Packets must carry the same name.
        incarnation: Identity of this start of the trunk. Packets must carry the same identity.
        stage: Maker of the strategy's gradient stage for a client's copy; None for a strategy without a stage.
        callers: Number of threads that send packets.
    """
    spans = spans_of(config)
    replicas: list[list[LocalTrunk]] = []
    for replica in range(config.trunk.replicas):
        stages: list[LocalTrunk] = []
        # From the last stage to the first, as each stage is given the one above it.
        for number in reversed(range(len(spans))):
            trunk = LocalTrunk(
                config,
                run,
                incarnation,
                stage=stage,
                callers=callers,
                span=spans[number],
                rest=stages[0] if stages else None,
                join=_join_of(replicas[0][number], replica) if replicas else None,
            )
            stages.insert(0, trunk)
        replicas.append(stages)
    return replicas


def _join_of(first: LocalTrunk, replica: int) -> Join | None:
    """Returns a further replica's way to the adapter of all replicas, which lives in the first."""
    master = first.server.adapters.master
    if master is None:
        return None
    return lambda make: (LocalPeers(master, replica), None)


class LocalTrunks(JoinedTrunks):
    """All trunks of a run in this process, called like one trunk."""

    def __init__(self, config: Config, replicas: Sequence[Sequence[LocalTrunk]]) -> None:
        """Joins trunks.

        Args:
            config: Configuration of the run.
            replicas: The stages of each replica, from the bottom to the top.
        """
        super().__init__(config, replicas)
        self._replicas = replicas

    def nodes(self) -> list[str]:
        """Returns no nodes, since there is no Ray."""
        return []

    def kill(self) -> None:
        """Closes all stages of all replicas."""
        for stages in self._replicas:
            for one in stages:
                one.close()
