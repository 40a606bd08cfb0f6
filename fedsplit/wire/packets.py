"""What crosses between a client and the trunk at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

_LARGEST_NUMBER = 2**63 - 1
_MOST_DIMENSIONS = 3

_TENSORS = frozenset({"hidden", "gradient", "mask", "routers", "coefficient", "norm"})
"""Names under which tensors cross."""

_ARRAYS = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"})
"""Types of the arrays that cross."""


class MalformedPacket(ValueError):
    """A packet with a field of the wrong type, or a value that the field cannot have."""


@dataclass(frozen=True)
class StepKey:
    """Names one step of one client, so that forward and backward find each other, and each counts once.

    Attributes:
        round: The round, from 1; 0 is the evaluation before the first.
        client: The client's partition, from 0.
        step: The step within the round, from 0.
        attempt: How often the client's round was begun before.
        micro: The micro-batch within the batch, from 0.
        run: The run's name.
        batch: The batch within the step, from 0; above 0 only where gradients are accumulated.
        session: Where text is generated, which one: `step` counts what was sent of it, from 0, the prompt. Empty
            elsewhere.
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
        """Where the batch lies in its client's time: what is smaller came before."""
        return self.round, self.attempt, self.step, self.batch

    @property
    def turn(self) -> tuple[int, int, int]:
        """Which step of the optimiser it belongs to."""
        return self.round, self.attempt, self.step

    def __str__(self) -> str:
        if self.session:
            return f"session {self.session}, client {self.client}, step {self.step}"
        batch = f", batch {self.batch}" if self.batch else ""
        return f"round {self.round}, client {self.client}, step {self.step}.{self.micro}{batch}, attempt {self.attempt}"


@dataclass(frozen=True)
class Encoded:
    """A tensor as it lies on the wire.

    Attributes:
        data: The encoded values; their bytes are what is counted.
        dtype: The name of the type to decode into, such as "float32".
        scale: What the values were multiplied by to fit into a narrow type; a power of two.
    """

    data: np.ndarray
    dtype: str
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return self.data.nbytes


@dataclass(frozen=True)
class Packet:
    """One message between a client and the trunk.

    Attributes:
        key: The step it belongs to.
        tensors: "hidden" or "gradient" (B, T, D), "mask" (B, T) where a batch is padded, and "routers" where there is
            an auxiliary loss (`fedsplit.model.routers`): the sums (2E + 1,), or the gradient (E,) by them. Empty where
            an answer carries nothing, as when the client's bottom has nothing to learn, and where a client
            asks whether there is room for its hidden states. With clipping, "norm" () in the answer to the last
            gradient of a step, the squared norm of the adapter's gradient; and "coefficient" (), which the client
            sends then, and which the gradient is scaled by.
        training: Whether this is a training step, with dropout, or evaluation.
        wants_gradient: Whether the client's bottom can use a gradient.
        micros: Micro-batches that the batch consists of.
        batches: Batches that the step consists of.
        rate: The share of the learning rate at which the step is made.
        learns: Whether the trunk's adapter learns from the step. A client may want a gradient alone, as for an adapter
            that only itself has.
        incarnation: Which life of the trunk it is meant for; a trunk that was started again has another.
        shape: Of a question for room: that of the hidden states to come.
        wait: Of an answer: the trunk has no room for the step now; ask again after so many seconds.
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
        """In how many parts the gradients of a step come."""
        return self.micros * self.batches

    @property
    def ends(self) -> bool:
        """Whether it is of the last part of its step."""
        return (self.key.batch, self.key.micro) == (self.batches - 1, self.micros - 1)

    @property
    def clipping_key(self) -> StepKey:
        """Under which key its step's coefficient comes: that of one micro-batch more than the last batch has."""
        return replace(self.key, batch=self.batches - 1, micro=self.micros)

    @property
    def clips(self) -> bool:
        """Whether it tells what a step's gradient is to be scaled by."""
        return "coefficient" in self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, read off the encoded data."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def check_form(packet: Packet) -> None:
    """Makes sure that every field of a packet has its type, so that nothing behind this has to expect another one.

    Whether the values make sense at this moment is for the trunk to say.

    Raises:
        MalformedPacket: A field does not have its type; the message names it.
    """
    if type(packet) is not Packet or type(packet.key) is not StepKey:
        raise MalformedPacket("what came is no packet with the key of a step")
    for record, checks in ((packet.key, _KEY_CHECKS), (packet, _PACKET_CHECKS)):
        for name, kind, fits in checks:
            if not fits(value := getattr(record, name)):
                raise MalformedPacket(f"{name} of a packet is {_shown(value)}, not {kind}")
    for name, encoded in packet.tensors.items():
        _check_encoded(name, encoded)


def _check_encoded(name: object, encoded: object) -> None:
    """As `check_form`, of one tensor."""
    if not isinstance(name, str) or name not in _TENSORS:
        raise MalformedPacket(f"{_shown(name)} is no tensor that crosses")
    if not isinstance(encoded, Encoded) or not isinstance(encoded.data, np.ndarray):
        raise MalformedPacket(f"{name} of a packet is {_shown(encoded)}, not an array")
    form = encoded.data.dtype
    if not may_cross(form) or encoded.data.ndim > _MOST_DIMENSIONS:
        raise MalformedPacket(f"{name} of a packet is an array of {encoded.data.ndim} dimensions of {form}")
    if not isinstance(encoded.dtype, str):
        raise MalformedPacket(f"the type of {name} is {_shown(encoded.dtype)}, not the name of one")
    if not _is_number(encoded.scale) or not 0 < encoded.scale < math.inf:
        raise MalformedPacket(f"the scale of {name} is {_shown(encoded.scale)}, not a number above 0")


def may_cross(form: np.dtype) -> bool:
    """Returns whether arrays of that type cross; those of another machine's byte order do not."""
    return form.name in _ARRAYS and form.isnative


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_NUMBER


def _is_number(value: Any) -> bool:
    return type(value) is float or _is_count(value)


_CHECKS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number from 0", _is_count),
    "float": ("a number", _is_number),
    "bool": ("true or false", lambda value: type(value) is bool),
    "str": ("a text", lambda value: type(value) is str),
    "tuple[int, ...]": ("a shape", lambda value: type(value) is tuple and all(map(_is_count, value))),
    "Mapping[str, Encoded]": ("tensors by name", lambda value: isinstance(value, Mapping)),
    "parts": ("a whole number from 1", lambda value: _is_count(value) and value > 0),
}
"""By the type of a field: a value that it takes in words, and whether a value is one."""

_KEY_CHECKS = [(field.name, *_CHECKS[str(field.type)]) for field in fields(StepKey)]

_PACKET_CHECKS = [
    (field.name, *_CHECKS["parts" if field.name in ("micros", "batches") else str(field.type)])
    for field in fields(Packet)
    if field.name != "key"
]


def _shown(value: object) -> str:
    """Returns a value as a message shows it; of what may be long, or raise an error as text, the type alone."""
    simple = type(value) in (bool, float) or value is None or _is_count(value)
    return repr(value) if simple or (type(value) is str and len(value) < 40) else f"a {type(value).__name__}"
