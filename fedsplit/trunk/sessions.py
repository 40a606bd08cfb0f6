"""Decoding sessions: the trunk's key-value caches for texts that clients generate."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, replace

from torch import Tensor

from fedsplit.clock import Clock
from fedsplit.model.caches import Past
from fedsplit.model.facts import positions_of
from fedsplit.trunk.server import TrunkServer
from fedsplit.trunk.status import Bytes
from fedsplit.trunk.trainable import AdapterSnapshot
from fedsplit.wire.packets import Packet
from fedsplit.wire.steps import ExpiredStep, RefusedStep, SpoiledStep, StaleStep, UnknownStep

MOST = 64
"""Most sessions at once."""

_REMEMBERED = 4096
"""Largest number of ended sessions that are remembered, each with the reason of the end."""


class EarlyStep(RefusedStep):
    """The request is for a token of a session, but the earlier tokens have not come."""


class FullTrunk(RefusedStep):
    """The trunk has no memory for the request, or too many sessions."""


@dataclass(eq=False)
class _Session:
    """A batch of sequences that grows.

    Attributes:
        client: Client that generates.
        past: Cache of the trunk's blocks.
        snapshot: Snapshot of the adapter at the beginning, for all steps of the session.
        rows: Number of sequences.
        step: Last answered step.
        answer: Answer to the last step.
        until: Time at which the lease runs out.
    """

    client: int
    past: Past
    snapshot: AdapterSnapshot
    rows: int
    step: int = -1
    answer: Packet | None = None
    until: float = 0.0


class Sessions:
    """Answers clients that generate text: the prompts first, then one token of each sequence at a time.

    Every step counts once, as in training. A repeated step gets the same answer, and is not appended again. A step
    that comes too early or too late, or belongs to no open session, is refused by name and changes nothing.

    A session is freed when the client ends the session or leaves, and when the lease runs out. After a failed
    computation the session is over, since part of the step may have been appended. Sessions share only the weights.
    """

    def __init__(
        self,
        server: TrunkServer,
        lease: float,
        most: int = MOST,
        clock: Clock = time.monotonic,
    ) -> None:
        """Starts without sessions.

        Args:
            server: Trunk with the weights and the counts of bytes.
            lease: Seconds for which a session waits for the next token.
            most: Most sessions at once.
            clock: Clock for leases.
        """
        self._server = server
        self._lease = lease
        self._most = most
        self._clock = clock
        self._open: dict[str, _Session] = {}
        self._over: OrderedDict[str, tuple[type[RefusedStep], str]] = OrderedDict()

    def serve(self, packet: Packet) -> Packet:
        """Answers a step of a session.

        Args:
            packet: Step 0 has the hidden states (B, T, D) of the prompts, with a mask for prompts of different
                lengths. Padding is on the left, between virtual tokens and text. Each later step has (B, 1, D). A
                packet without tensors ends the session.

        Returns:
            Hidden states of the same shape.

        Raises:
            RefusedStep: The packet must not be served; nothing was done.
        """
        # Sessions are not in the list of steps, but the run, the incarnation and the client must fit all the same.
        self._server.steps.check(packet)
        self.expire()
        # Generation is no training, whatever the packet says: dropout would change the text.
        packet = replace(packet, training=False)
        key = packet.key
        session = self._open.get(key.session)
        if session is not None and session.client != key.client:
            raise UnknownStep(f"{key}: the session is another client's")
        if not packet.tensors:
            self._close(key.session, StaleStep, "has ended")
            return Packet(key, training=False)
        if session is None:
            return self._go_on(self._begin(packet), packet)

        if key.step == session.step and session.answer is not None:
            session.until = self._clock() + self._lease
            # The kept answer: to extend the cache a second time would put the token into the text twice.
            return self._counted(self._server.traffic.repeated, packet, session.answer)
        if key.step != session.step + 1:
            refusal = StaleStep if key.step < session.step else EarlyStep
            raise refusal(f"{key} does not follow step {session.step}, the last that came")
        return self._go_on(session, packet)

    def _begin(self, packet: Packet) -> _Session:
        """Returns a new session for prompts. `_go_on` opens the session after the computation of the prompts.

        Raises:
            RefusedStep: The session has ended, does not exist, or is one too many; or the prompts cannot be used.
        """
        key = packet.key
        if key.session in self._over:
            refusal, reason = self._over[key.session]
            raise refusal(f"{key}: the session {reason}")
        if key.step:
            raise UnknownStep(f"{key}: there is no such session")
        if len(self._open) >= self._most:
            raise FullTrunk(f"{key}: there are {self._most} sessions already, as many as there may be")

        part, snapshot = self._server.inference(key.client)
        intake = self._server.intake
        intake.check_tensors(packet, "hidden", "mask")
        hidden = intake.hidden(packet)
        mask = intake.mask(packet, hidden) if "mask" in packet.tensors else None
        # A token is appended on the right of every row. Padding there would lie between two tokens of a text.
        if mask is not None and not _is_left_padded(mask, part.virtual):
            raise SpoiledStep(f"{key} sent a mask of texts that are not padded on the left")
        return _Session(key.client, Past(part, mask), snapshot, len(hidden))

    def _go_on(self, session: _Session, packet: Packet) -> Packet:
        """Computes the next step of a session, and answers it."""
        key = packet.key
        # Placed again at each token, since other clients' steps use the same modules in between.
        part, _ = self._server.inference(key.client, session.snapshot)
        self._server.intake.check_tensors(packet, "hidden", "mask")
        hidden = self._server.intake.hidden(packet)
        count = 1 if key.step else hidden.shape[1]
        expected = (session.rows, count, part.config.hidden_size)
        if hidden.shape != expected:
            raise SpoiledStep(f"{key} sent hidden states of shape {tuple(hidden.shape)}, not {expected}")
        longest = positions_of(part.config)
        if session.past.length + count > longest:
            raise SpoiledStep(f"{key} goes beyond the model's {longest} positions")
        if not self._server.has_room(session.rows * count):
            raise FullTrunk(f"{key}: there is no room for it under the trunk's budget of memory")

        traffic = self._server.traffic
        crossed = traffic.token if key.step else traffic.prompt
        try:
            output = session.past.extend(hidden)
            (answer,) = self._server.answers.with_hidden(crossed, [packet], {key: output}, sums={})
        except BaseException:  # also after an interrupt: a part of the blocks may have the token, and a part not
            self._close(key.session, StaleStep, "was given up, since its computation failed")
            raise
        session.step = key.step
        session.answer = answer
        session.until = self._clock() + self._lease
        self._open[key.session] = session
        return answer

    def _counted(self, crossed: Bytes, up: Packet, down: Packet) -> Packet:
        self._server.answers.count(crossed, up, down)
        return down

    def _close(self, name: str, refusal: type[RefusedStep], reason: str) -> None:
        """Frees a session, and remembers the reason of the end for a while. The reason of an earlier end stays."""
        self._open.pop(name, None)
        self._over.setdefault(name, (refusal, reason))
        if len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)

    def expire(self) -> None:
        """Frees sessions with an expired lease."""
        now = self._clock()
        # A list, since closing a session removes it from the dictionary.
        expired = [name for name, session in self._open.items() if session.until <= now]
        for name in expired:
            self._close(name, ExpiredStep, "waited for its next token longer than a lease")

    def leave(self, client: int | None = None) -> None:
        """Ends the sessions of a client that has left the round or is dead; for None, ends all sessions."""
        for name, session in list(self._open.items()):
            if client in (None, session.client):
                self._close(name, StaleStep, "has ended")

    def next_expiry(self) -> float | None:
        """Returns the time of the next end of a lease; None without sessions."""
        return min((session.until for session in self._open.values()), default=None)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(session.past.nbytes for session in self._open.values())

    def __len__(self) -> int:
        """Returns the number of open sessions."""
        return len(self._open)


def _is_left_padded(mask: Tensor, virtual: int) -> bool:
    """Returns True if a mask has padding at the beginnings of the texts alone.

    Args:
        mask: (B, P + T), 0 on padding.
        virtual: P, the number of virtual tokens. Virtual tokens precede the text, and are never padding.

    Example:
        >>> import torch
        >>> _is_left_padded(torch.tensor([[0, 1, 1]]), virtual=0), _is_left_padded(torch.tensor([[1, 1, 0]]), virtual=0)
        (True, False)
    """
    of_virtual_tokens, of_text = mask.bool().tensor_split([virtual], 1)
    if not of_text.numel():
        return False
    ends_in_text = of_text[:, -1].all()
    after = of_text[:, 1:]
    before = of_text[:, :-1]
    never_falls = (after >= before).all()  # padding, then text, and no padding again
    return bool(of_virtual_tokens.all() and ends_in_text and never_falls)
