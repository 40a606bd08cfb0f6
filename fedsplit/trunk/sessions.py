"""Texts that clients generate through the trunk: what it remembers of each, how long, and what it must refuse."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedsplit.model.caches import Past
from fedsplit.trunk.learner import Version
from fedsplit.trunk.server import TrunkServer
from fedsplit.wire.codecs import Codec
from fedsplit.wire.packets import Packet
from fedsplit.wire.steps import ExpiredStep, RefusedStep, SpoiledStep, StaleStep, UnknownStep

MOST = 64
"""Sessions at once."""

_REMEMBERED = 4096
"""Sessions that are over, of which is still known why."""


class EarlyStep(RefusedStep):
    """A token of a session, where those before it have not come."""


class FullTrunk(RefusedStep):
    """A request for which the trunk has no room."""


@dataclass(eq=False)
class _Session:
    """A batch of sequences that grows.

    Attributes:
        client: Whose it is.
        past: What the trunk remembers of it.
        version: The version of the adapter that it began with, and goes on with.
        rows: Sequences.
        step: The last step that was answered.
        answer: Its answer.
        until: When its lease runs out.
    """

    client: int
    past: Past
    version: Version
    rows: int
    step: int = -1
    answer: Packet | None = None
    until: float = 0.0


class Sessions:
    """Answers clients that generate text: the prompts first, then a token of each sequence at a time.

    Every step counts once, as in training: what comes again gets the same answer and is not appended again; what
    comes too early or too late, or belongs to nothing that is open, is refused by name, and changes nothing. A
    session is freed when its client ends it or leaves, and when nothing has come of it for as long as a lease.
    Sessions share nothing but the weights. One whose computation fails is over, since parts of it may have been
    appended.
    """

    def __init__(
        self,
        server: TrunkServer,
        codec: Codec,
        lease: float,
        most: int = MOST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts with no session.

        Args:
            server: Who has the weights, and counts the bytes: of prompts as "prompt_…", of tokens as "token_…".
            codec: How tensors are encoded, the same at the clients.
            lease: Seconds that a session may wait for its next token.
            most: Sessions at once.
            clock: Seconds, always growing.
        """
        self._server, self._codec, self._lease, self._most, self._clock = server, codec, lease, most, clock
        self._open: dict[str, _Session] = {}
        self._over: OrderedDict[str, tuple[type[RefusedStep], str]] = OrderedDict()

    def serve(self, packet: Packet) -> Packet:
        """Answers a step of a session.

        Args:
            packet: Hidden states (B, T, D) of the prompts as step 0, with a mask where they are padded on the left,
                between virtual tokens and text where there are any; then (B, 1, D) a step. Without tensors, the session
                is over.

        Returns:
            Hidden states of the same shape.

        Raises:
            RefusedStep: The packet must not be served; nothing was done.
        """
        self._server.steps.check(packet)
        self.expire()
        key = packet.key
        session = self._open.get(key.session)
        if session is not None and session.client != key.client:
            raise UnknownStep(f"{key}: the session is another client's")
        if not packet.tensors:
            self._close(key.session, StaleStep, "has ended")
            return Packet(key, training=False)
        if session is None:
            session = self._begin(packet)
        elif key.step == session.step and session.answer is not None:
            session.until = self._clock() + self._lease
            return self._count("repeated", packet, session.answer)
        elif key.step != session.step + 1:
            refusal = StaleStep if key.step < session.step else EarlyStep
            raise refusal(f"{key} does not follow step {session.step}, the last that came")
        return self._go_on(session, packet)

    def _begin(self, packet: Packet) -> _Session:
        """A session for prompts; it is open once they have been computed."""
        key = packet.key
        if key.session in self._over:
            refusal, why = self._over[key.session]
            raise refusal(f"{key}: the session {why}")
        if key.step:
            raise UnknownStep(f"{key}: there is no such session")
        if len(self._open) >= self._most:
            raise FullTrunk(f"{key}: there are {self._most} sessions already, as many as there may be")
        part, version = self._server.inference(key.client)
        intake = self._server.intake
        hidden = intake.hidden(packet)
        mask = intake.mask(packet, hidden) if "mask" in packet.tensors else None
        if mask is not None and not _is_left_padded(mask, part.virtual):
            raise SpoiledStep(f"{key} sent a mask of texts that are not padded on the left")
        return _Session(key.client, Past(part, mask), version, len(hidden))

    def _go_on(self, session: _Session, packet: Packet) -> Packet:
        key = packet.key
        part, _ = self._server.inference(key.client, session.version)
        hidden = self._server.intake.hidden(packet)
        count = 1 if key.step else hidden.shape[1]
        expected = (session.rows, count, part.config.hidden_size)
        if hidden.shape != expected:
            raise SpoiledStep(f"{key} sent hidden states of shape {tuple(hidden.shape)}, not {expected}")
        if session.past.length + count > (longest := part.config.max_position_embeddings):
            raise SpoiledStep(f"{key} goes beyond the model's {longest} positions")
        if not self._server.has_room(session.rows * count):
            raise FullTrunk(f"{key}: there is no room for it under the trunk's budget of memory")
        try:
            output = session.past.extend(hidden)
        except BaseException:
            self._close(key.session, StaleStep, "was given up, since its computation failed")
            raise
        answer = Packet(key, {"hidden": self._codec.encode(output)}, training=False)
        session.step, session.answer, session.until = key.step, answer, self._clock() + self._lease
        self._open[key.session] = session
        return self._count("token" if key.step else "prompt", packet, answer)

    def _count(self, what: str, up: Packet, down: Packet) -> Packet:
        self._server.traffic[f"{what}_up"] += up.nbytes
        self._server.traffic[f"{what}_down"] += down.nbytes
        return down

    def _close(self, name: str, refusal: type[RefusedStep], why: str) -> None:
        """Frees a session, and remembers for a while why it is over; that it was over before stays as it is."""
        self._open.pop(name, None)
        self._over.setdefault(name, (refusal, why))
        if len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)

    def expire(self) -> None:
        """Frees sessions whose lease has run out."""
        now = self._clock()
        for name in [name for name, session in self._open.items() if session.until <= now]:
            self._close(name, ExpiredStep, "waited for its next token longer than a lease")

    def leave(self, client: int | None = None) -> None:
        """Ends the sessions of a client that is done or dead; everybody's where None."""
        for name in [name for name, session in self._open.items() if client in (None, session.client)]:
            self._close(name, StaleStep, "has ended")

    def next_expiry(self) -> float | None:
        """When the next lease runs out, by the clock."""
        return min((session.until for session in self._open.values()), default=None)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is remembered."""
        return sum(session.past.nbytes for session in self._open.values())

    def __len__(self) -> int:
        """How many sessions are open."""
        return len(self._open)


def _is_left_padded(mask: Tensor, virtual: int) -> bool:
    """Whether texts behind so many virtual tokens are there, and padded at their beginnings alone."""
    before, seen = mask.bool().tensor_split([virtual], 1)
    return bool(before.all() and seen.numel() and seen[:, -1].all() and (seen[:, 1:] >= seen[:, :-1]).all())
