"""Packets: the messages that cross between a client and the trunk at every step."""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from fedsplit.wire.encoded import Encoded, MalformedPacket, check_encoded, is_count, shown

_LONGEST_TEXT = 256
_MOST_DIMENSIONS = 8

RANDOM = "random"
"""Name of the state of the random generator that one stage of a trunk hands to the next."""

EXAMPLES = "examples"
"""Name of the numbers of a step's examples, which some codecs need."""

_TENSORS = frozenset({"hidden", "gradient", "mask", "routers", "coefficient", "norm", RANDOM, EXAMPLES})
"""Names of the tensors that may cross."""


@dataclass(frozen=True)
class StepKey:
    """Identifies one step of one client: the link between forward and backward, and the reason why both count once.

    Attributes:
        round: Number of the round, from 1; 0 for the evaluation before round 1.
        client: Number of the client's partition, from 0.
        step: Number of the step within the round, from 0.
        attempt: Number of times that the client began the round before.
        micro: Number of the micro-batch within the batch, from 0.
        run: Name of the run.
        batch: Number of the batch within the step, from 0. Above 0 only with accumulated gradients.
        session: Id of the decoding session; empty outside of text generation. In a session, `step` counts packets, and
            the prompt is packet 0.

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
        """Identifies the step of the optimiser. All batches of a step have the same turn."""
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
        key: Step of the packet.
        tensors: Encoded tensors by name:

            - "hidden" or "gradient" (B, T, D).
            - "mask" (B, T), for a padded batch.
            - "routers", with an auxiliary loss (`fedsplit.model.routers`): the router sums (2E + 1,), or the gradient
              (E,) by the router sums.
            - "norm" (), with clipping, in the answer to the last gradient of a step: the squared norm of the trunk's
              gradient.
            - "coefficient" (), with clipping: the client's reply to "norm", a factor for the trunk's gradient.
            - "examples" (B,), for a codec that needs them: the number of each sequence within the client's data.
            - "random" (bytes), between two stages of a trunk: the state of the random generator behind a stage.

            Empty in an admission request, and in an answer without a result, as for a bottom that does not learn.
        training: True for a training step with dropout; False for evaluation.
        wants_gradient: True if the client's bottom can use a gradient.
        micros: Number of micro-batches in the batch.
        batches: Number of batches in the step.
        rate: Share of the learning rate for the step.
        learns: False if the client wants a gradient and the trunk must not learn, as for a client's private adapter.
        is_adapted: False for a forward through the base weights alone, without the trunk's adapter.
        incarnation: Identity of one start of the trunk. A restarted trunk refuses packets for earlier starts.
        shape: In an admission request: shape of the hidden states to come.
        wait: In an answer: seconds until the client should ask again, since memory is short; 0 for a served request.

    Example:
        >>> packet = Packet(StepKey(round=1, client=0, step=0), micros=2)
        >>> packet.parts, packet.ends, packet.nbytes
        (2, False, 0)
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
    is_adapted: bool = True

    @property
    def parts(self) -> int:
        """Number of gradients in a step: one for each micro-batch of each batch."""
        return self.micros * self.batches

    @property
    def ends(self) -> bool:
        """True for the last part of a step."""
        is_last_batch = self.key.batch == self.batches - 1
        return is_last_batch and self.key.micro == self.micros - 1

    @property
    def clipping_key(self) -> StepKey:
        """Key of the packet with the step's clipping coefficient, as if the last batch had one more micro-batch."""
        return replace(self.key, batch=self.batches - 1, micro=self.micros)

    @property
    def clips(self) -> bool:
        """True for the packet with a step's clipping coefficient."""
        return "coefficient" in self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all encoded arrays. The number is measured, and never reported by a client."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def check_form(packet: Packet) -> None:
    """Checks the type of every field of a packet, so that later code may rely on the types.

    Whether the values make sense for a step is checked later, by the trunk.

    Raises:
        MalformedPacket: A field has a wrong type. The message names the field.

    Example:
        >>> check_form(Packet(StepKey(round=1, client=0, step=-1)))
        Traceback (most recent call last):
        fedsplit.wire.encoded.MalformedPacket: step of a packet is a int, not a whole number from 0
    """
    if type(packet) is not Packet or type(packet.key) is not StepKey:  # Ray delivers any object
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
"""By the type of a field: words for the possible values, and a check of a value.

The checks compare `type(value)`: `isinstance` would accept True as a number, and a subclass with harmful methods.
"""

# Types of fields are texts, as this module's annotations are not evaluated.
_KEY_CHECKS = [(field.name, *_CHECKS[str(field.type)]) for field in fields(StepKey)]


def _check_of(field: Field[Any]) -> tuple[str, str, Callable[[Any], bool]]:
    """Returns the name of a packet's field, words for the possible values, and a check of a value."""
    # A number of parts is 1 at least, since the trunk divides by the number.
    kind = "parts" if field.name in ("micros", "batches") else str(field.type)
    return field.name, *_CHECKS[kind]


_PACKET_CHECKS = [_check_of(field) for field in fields(Packet) if field.name != "key"]  # the key has `_KEY_CHECKS`


def new_trunk_name() -> str:
    """Returns a new name for a trunk and its run. All names have the same length, so that headers have it, too."""
    return f"trunk-{uuid.uuid4()}"


def new_incarnation() -> str:
    """Returns a new identity for one start of a trunk. All identities have the same length.

    Example:
        >>> len(new_incarnation()), new_incarnation() == new_incarnation()
        (16, False)
    """
    return secrets.token_hex(8)
