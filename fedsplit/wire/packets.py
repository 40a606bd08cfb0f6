"""Packets: the messages that cross between a client and the trunk at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fedsplit.wire.encoded import Encoded, MalformedPacket, check_encoded, is_count, shown

_LONGEST_TEXT = 256
_MOST_DIMENSIONS = 8

_TENSORS = frozenset({"hidden", "gradient", "mask", "routers", "coefficient", "norm"})
"""Names of the tensors that may cross."""


@dataclass(frozen=True)
class StepKey:
    """Identifies one step of one client, so that forward and backward find each other, and each counts once.

    Attributes:
        round: Number of the round, from 1; 0 is the evaluation before the first one.
        client: Number of the client's partition, from 0.
        step: Number of the step within the round, from 0.
        attempt: How often the client has begun this round before.
        micro: Number of the micro-batch within the batch, from 0.
        run: Name of the run.
        batch: Number of the batch within the step, from 0; above 0 only where gradients are accumulated.
        session: Id of the decoding session, where text is generated; `step` then counts its packets, the prompt being
            0. Empty elsewhere.

    Example:
        >>> str(StepKey(round=2, client=5, step=7))
        'round 2, client 5, step 7.0, attempt 0'
    """

    round: int
    client: int
    step: int
    attempt: int = 0
    micro: int = 0
    run: str = ""
    batch: int = 0
    session: str = ""

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Order of the batches of one client: a smaller place came earlier."""
        return self.round, self.attempt, self.step, self.batch

    @property
    def turn(self) -> tuple[int, int, int]:
        """Identifies the step of the optimiser that this batch belongs to."""
        return self.round, self.attempt, self.step

    def __str__(self) -> str:
        if self.session:
            return f"session {self.session}, client {self.client}, step {self.step}"
        batch = f", batch {self.batch}" if self.batch else ""
        return f"round {self.round}, client {self.client}, step {self.step}.{self.micro}{batch}, attempt {self.attempt}"


@dataclass(frozen=True)
class Packet:
    """One message between a client and the trunk.

    Attributes:
        key: Step that the packet belongs to.
        tensors: Encoded tensors by name:

            - "hidden" or "gradient" (B, T, D).
            - "mask" (B, T), where a batch is padded.
            - "routers", where there is an auxiliary loss (`fedsplit.model.routers`): the sums (2E + 1,), or the
              gradient (E,) by them.
            - "norm" (), with clipping, in the answer to the last gradient of a step: the squared norm of the trunk's
              gradient.
            - "coefficient" (), with clipping: the client's reply to "norm", which the gradient is scaled by.

            Empty in an admission request, and in an answer that carries nothing, as when the client's bottom has
            nothing to learn.
        training: True for a training step, which has dropout; False for evaluation.
        wants_gradient: True if the client's bottom can use a gradient.
        micros: Number of micro-batches in the batch.
        batches: Number of batches in the step.
        rate: Share of the learning rate at which the step is made.
        learns: False where the client wants a gradient alone, such as for an adapter that only itself has.
        incarnation: Id of the trunk's life that the packet is meant for; a restarted trunk has another one.
        shape: In an admission request: shape of the hidden states that will follow.
        wait: In an answer: seconds after which to ask again, where the trunk has no memory for the step now.
    """

    key: StepKey
    tensors: Mapping[str, Encoded] = field(default_factory=dict)
    training: bool = True
    wants_gradient: bool = True
    micros: int = 1
    incarnation: str = ""
    shape: tuple[int, ...] = ()
    wait: float = 0.0
    batches: int = 1
    rate: float = 1.0
    learns: bool = True

    @property
    def parts(self) -> int:
        """Number of parts in which the gradients of a step come."""
        return self.micros * self.batches

    @property
    def ends(self) -> bool:
        """True for the last part of a step."""
        return (self.key.batch, self.key.micro) == (self.batches - 1, self.micros - 1)

    @property
    def clipping_key(self) -> StepKey:
        """Key of the packet with the step's clipping coefficient: the last batch's, one micro-batch after its last."""
        return replace(self.key, batch=self.batches - 1, micro=self.micros)

    @property
    def clips(self) -> bool:
        """True for the packet with a step's clipping coefficient."""
        return "coefficient" in self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, read off the encoded arrays."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def check_form(packet: Packet) -> None:
    """Makes sure that every field of a packet has its type, so that nothing behind this has to expect another one.

    The trunk decides later whether the values make sense at this moment.

    Raises:
        MalformedPacket: A field does not have its type; the message names it.
    """
    if type(packet) is not Packet or type(packet.key) is not StepKey:
        raise MalformedPacket("what came is no packet with the key of a step")
    for record, checks in ((packet.key, _KEY_CHECKS), (packet, _PACKET_CHECKS)):
        for name, kind, fits in checks:
            value = getattr(record, name)
            if not fits(value):
                raise MalformedPacket(f"{name} of a packet is {shown(value)}, not {kind}")
    for name, encoded in packet.tensors.items():
        if not isinstance(name, str) or name not in _TENSORS:
            raise MalformedPacket(f"{shown(name)} is no tensor that crosses")
        check_encoded(name, encoded)


def _is_number(value: Any) -> bool:
    return is_count(value) or (type(value) is float and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= _LONGEST_TEXT


def _is_shape(value: Any) -> bool:
    return type(value) is tuple and len(value) <= _MOST_DIMENSIONS and all(map(is_count, value))


_CHECKS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number from 0", is_count),
    "float": ("a finite number", _is_number),
    "bool": ("true or false", lambda value: type(value) is bool),
    "str": (f"a text of up to {_LONGEST_TEXT} characters", _is_text),
    "tuple[int, ...]": ("a shape", _is_shape),
    "Mapping[str, Encoded]": ("tensors by name", lambda value: isinstance(value, Mapping)),
    "parts": ("a whole number from 1", lambda value: is_count(value) and value > 0),
}
"""By the type of a field: words for its values, and a check of one."""

_KEY_CHECKS = [(field.name, *_CHECKS[str(field.type)]) for field in fields(StepKey)]

_PACKET_CHECKS = [
    (field.name, *_CHECKS["parts" if field.name in ("micros", "batches") else str(field.type)])
    for field in fields(Packet)
    if field.name != "key"
]
